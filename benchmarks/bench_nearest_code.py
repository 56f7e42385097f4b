"""nearest_code at the shapes of well-known tokenizers, at FAISS's best sizes and beyond its cliffs.

FAISS is at its best for l2, D <= 32 and N x D >= 128000 ("A", "C", "D"); has no fused kernel for inner products; and
goes row by row below N x D = 128000. "E" and the float32 scan of "A" and "C" are where we hardly win.
"""

import peers
import pytest
import torch
from harness import Problem, assert_same_ids, compare, normal
from tokenflow_expression import distances
from unitok_expression import unitok_indices

from tokenflow_ext import ops, reference

# rows, groups, codes, width, metric, rivals
SIZES = {
    "A, TokenFlow's pixel table": (16384, 0, 32768, 8, "l2", "float32 faiss tokenflow"),
    "A, cosine": (16384, 0, 32768, 8, "cosine", "faiss lucidrains"),
    "A, dot": (16384, 0, 32768, 8, "dot", "faiss"),
    "C, UniTok": (16384, 8, 4096, 8, "l2", "float32 faiss"),
    "C, UniTok, cosine": (16384, 8, 4096, 8, "cosine", "faiss unitok"),
    "D, wide VAR": (65536, 0, 8192, 32, "l2", "float32 faiss"),
    "E, VQGAN": (16384, 0, 16384, 256, "l2", "float32 twin faiss"),
    "LlamaGen": (4096, 0, 16384, 8, "cosine", "twin faiss"),
    "VAR": (10880, 0, 4096, 32, "l2", "twin faiss compile var"),
    "IBQ": (512, 0, 262144, 256, "dot", "faiss"),
    "below FAISS's cliff": (15872, 0, 32768, 8, "l2", "faiss"),
    "far below FAISS's cliff": (4096, 0, 32768, 8, "l2", "faiss"),
    "64 rows": (64, 0, 32768, 32, "l2", "twin faiss"),
    "16 rows": (16, 0, 32768, 32, "l2", "twin faiss"),
    "1 row": (1, 0, 32768, 32, "l2", "twin faiss"),
}


def var_indices(x, codebook):
    """VAR's expression, restated: argmin of an N x K matrix, an outer sum and addmm_. Source: arXiv 2404.02905."""
    distance = x.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return distance.addmm_(x, codebook.T, alpha=-2).argmin(1)


def problem(name: str) -> Problem:
    """`name` is one of SIZES."""
    rows, groups, codes, width, metric, rivals = SIZES[name]
    shape = (groups,) if groups else ()
    x, codebook = normal(rows, *shape, width, seed=1), normal(*shape, codes, width, seed=2)
    without = torch.no_grad()
    native = without(lambda: ops.nearest_code(x, codebook, metric=metric, backend="native"))
    twin = without(lambda: reference.nearest_code(x, codebook, metric=metric))
    others = {
        "twin": ("twin", twin),
        "float32": ("native, float32", peers.float32_search(native)),
        "faiss": ("FAISS", peers.faiss_flat(x, codebook, metric)),
        "lucidrains": ("vector-quantize-pytorch", peers.lucidrains_eval(x, codebook, metric)),
        "compile": ("torch.compile", peers.compiled(twin)),
        "tokenflow": ("TokenFlow's expression", without(lambda: distances(x, codebook).argmin(1))),
        "var": ("VAR's expression", without(lambda: var_indices(x, codebook))),
        "unitok": ("UniTok's expression", without(lambda: unitok_indices(x, codebook))),
    }
    calls = {"native": native, **dict(others[rival] for rival in rivals.split())}

    def check(results):
        for rival in results:
            by_group = zip(*(results[p].reshape(rows, -1).T for p in ("native", rival)))
            for g, (actual, expected) in enumerate(by_group):
                pick = x[:, g] if groups else x
                assert_same_ids(actual, expected, [pick], [codebook[g] if groups else codebook], metric)

    pairs, floats = rows * (groups or 1), 4 * width * (groups or 1)
    size = f"{name}: N {rows}, " + (f"G {groups}, " if groups else "") + f"K {codes}, D {width}, {metric}"
    return Problem(
        "nearest_code", size, calls, check, flop=2 * pairs * codes * width, bytes=floats * (rows + codes) + 8 * pairs
    )


@pytest.mark.parametrize("name", SIZES)
def bench_search(benchmark, name):
    compare(benchmark, "bench_nearest_code", name)
