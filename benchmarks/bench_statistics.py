"""code_statistics and ema_update_ against their twins: one EMA step of a codebook. Memory-bound."""

import pytest
import torch
from harness import Problem, assert_close, compare, normal

from tokenflow_ext import ops, reference

# rows, codes, width
SIZES = {
    "TokenFlow's pixel table": (16384, 32768, 8),
    "a million rows of 8": (2**20, 32768, 8),
    "VAR": (65536, 8192, 32),
    "a million rows of 32": (2**20, 8192, 32),
    "VQGAN": (16384, 16384, 256),
}


def problem(name: str) -> Problem:
    """`name` is an op and one of SIZES."""
    op, size = name.split(", ")
    rows, codes, width = SIZES[size]
    x = normal(rows, width, seed=1)
    indices = torch.randint(codes, (rows,), generator=torch.Generator().manual_seed(2))
    codebook = normal(codes, width, seed=3)

    def statistics(module):
        return lambda: module.code_statistics(x, indices, codes)

    def ema(module):
        counts, sums = reference.code_statistics(x, indices, codes)
        state = codebook.clone(), torch.ones(codes), codebook.clone()

        def step():
            module.ema_update_(*state, counts, sums, decay=0.99, metric="l2")
            return state

        return step

    def check(results):
        for actual, expected in zip(results["native"], results["twin"]):
            assert_close(actual, expected, 1e-5)

    if op == "code_statistics":
        made, moved = statistics, 8 * rows + 4 * rows * width + 4 * codes * (width + 1)
    else:
        hit = len(indices.unique())
        made, moved = ema, 4 * codes * 3 + 4 * codes * width * 3 + 4 * hit * width
    calls = {"native": made(ops), "twin": made(reference)}
    return Problem(op, f"{size}: N {rows}, K {codes}, D {width}", calls, check, bytes=moved, keeps_memory=True)


EMA = [f"ema_update_, {size}" for size in SIZES if "million" not in size]  # it does not see the rows


@pytest.mark.parametrize("name", [f"code_statistics, {size}" for size in SIZES] + EMA)
def bench_statistics(benchmark, name):
    compare(benchmark, "bench_statistics", name)
