"""shared_nearest_code: one index over TokenFlow's two tables, against FAISS on their concatenation.

The sum of the tables' cosine distances is the squared distance of the concatenated unit rows, which FAISS gets ready made.
"""

import peers
import pytest
import torch
import torch.nn.functional as F
from harness import Problem, assert_same_ids, compare, normal

from tokenflow_ext import ops, reference

# rows, codes, widths, rivals besides the twin
SIZES = {
    "B1, TokenFlow-B": (16384, 32768, (32, 8), "float32 faiss"),
    "B2, 64 + 8": (16384, 32768, (64, 8), "float32 faiss"),
    "one 16 x 16 image": (256, 32768, (32, 8), "faiss compile"),
    "the first scale of 16 images": (16, 32768, (32, 8), "faiss"),
}


def problem(name: str) -> Problem:
    """`name` is one of SIZES."""
    rows, codes, widths, rivals = SIZES[name]
    xs = [normal(rows, w, seed=w) for w in widths]
    tables = [normal(codes, w, seed=w + 1) for w in widths]
    joined = [torch.cat([F.normalize(t, dim=-1) for t in parts], 1) for parts in (xs, tables)]
    without = torch.no_grad()
    native = without(lambda: ops.shared_nearest_code(xs, tables, backend="native"))
    twin = without(lambda: reference.shared_nearest_code(xs, tables))
    others = {
        "float32": ("native, float32", peers.float32_search(native)),
        "faiss": ("FAISS", peers.faiss_flat(*joined, "l2")),
        "compile": ("torch.compile", peers.compiled(twin)),
    }
    calls = {"native": native, "twin": twin, **dict(others[rival] for rival in rivals.split())}

    def check(results):
        for rival in results:
            assert_same_ids(results["native"], results[rival], xs, tables, "cosine")

    width = sum(widths)
    size = f"{name}: N {rows}, K {codes}, D {' + '.join(map(str, widths))}, cosine"
    flop, moved = 2 * rows * codes * width, 4 * width * (rows + codes) + 8 * rows
    return Problem("shared_nearest_code", size, calls, check, flop=flop, bytes=moved)


@pytest.mark.parametrize("name", SIZES)
def bench_search(benchmark, name):
    compare(benchmark, "bench_shared_nearest_code", name)
