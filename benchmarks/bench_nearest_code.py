"""nearest_code against its twin, which forms the N x K matrix, at the shapes of well-known tokenizers."""

import pytest
import torch
from harness import Problem, assert_same_ids, compare, normal

from tokenflow_ext import ops, reference

# rows, groups, codes, width, metric
SIZES = {
    "LlamaGen": (4096, 0, 16384, 8, "cosine"),
    "TokenFlow pixel table": (4096, 0, 32768, 8, "l2"),
    "VAR": (8192, 0, 4096, 32, "l2"),
    "UniTok": (2048, 8, 4096, 8, "dot"),
    "VQGAN": (2048, 0, 16384, 256, "l2"),
}


def problem(name: str) -> Problem:
    """`name` is one of SIZES."""
    rows, groups, codes, width, metric = SIZES[name]
    shape = (groups,) if groups else ()
    x, codebook = normal(rows, *shape, width, seed=1), normal(*shape, codes, width, seed=2)

    def check(results):
        by_group = zip(*(results[p].reshape(rows, -1).T for p in ("native", "twin")))
        for g, (actual, expected) in enumerate(by_group):
            assert_same_ids(actual, expected, [x[:, g] if groups else x], [codebook[g] if groups else codebook], metric)

    without = torch.no_grad()
    calls = {
        "native": without(lambda: ops.nearest_code(x, codebook, metric=metric, backend="native")),
        "twin": without(lambda: reference.nearest_code(x, codebook, metric=metric)),
    }
    size = f"{name}: N {rows}, " + (f"G {groups}, " if groups else "") + f"K {codes}, D {width}, {metric}"
    return Problem("nearest_code", size, calls, check)


@pytest.mark.parametrize("name", SIZES)
def bench_nearest_code(benchmark, name):
    compare(benchmark, "bench_nearest_code", name)
