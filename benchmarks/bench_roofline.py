"""Search against the width of a code, K 8192 and more: how far from the FMA peak of the run, the plot's points."""

import peers
import pytest
import torch
from harness import Problem, assert_same_ids, compare, normal

from tokenflow_ext import ops

# width: rows, codes; about 2^33 multiply-adds each
SIZES = {
    8: (16384, 32768), 16: (16384, 16384), 24: (16384, 16384), 32: (16384, 16384), 40: (8192, 16384),
    72: (8192, 16384), 128: (8192, 8192), 256: (4096, 8192),
}  # fmt: skip


def problem(name: str) -> Problem:
    """`name` is a width."""
    width = int(name)
    rows, codes = SIZES[width]
    x, codebook = normal(rows, width, seed=1), normal(codes, width, seed=2)
    native = torch.no_grad()(lambda: ops.nearest_code(x, codebook))
    calls = {
        "native": native,
        "native, float32": peers.float32_search(native),
        "FAISS": peers.faiss_flat(x, codebook, "l2"),
        "matrix product": lambda: torch.mm(x, codebook.T),
    }

    def check(results):
        for rival in ("native, float32", "FAISS"):
            equal = assert_same_ids(results["native"], results[rival], [x], [codebook], "l2")
            assert rival == "FAISS" or equal.all()

    size, moved = f"D {width}: N {rows}, K {codes}, l2", 4 * width * (rows + codes) + 8 * rows
    return Problem("search by width", size, calls, check, flop=2 * rows * codes * width, bytes=moved)


@pytest.mark.parametrize("name", [str(width) for width in SIZES])
def bench_search(benchmark, name):
    compare(benchmark, "bench_roofline", name)
