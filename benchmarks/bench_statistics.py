"""code_statistics and ema_update_ against their twins: one EMA step of a codebook."""

import pytest
import torch
from harness import Problem, assert_close, compare, normal

from tokenflow_ext import ops, reference

# rows, codes, width
SIZES = {"VAR": (65536, 4096, 32), "VQGAN": (16384, 16384, 256)}


def problem(name: str) -> Problem:
    """`name` is an op and one of SIZES."""
    op, size = name.split(", ")
    rows, codes, width = SIZES[size]
    x = normal(rows, width, seed=1)
    indices = torch.randint(codes, (rows,), generator=torch.Generator().manual_seed(2))
    counts, sums = ops.code_statistics(x, indices, codes)
    codebook = normal(codes, width, seed=3)

    def statistics(module):
        return lambda: module.code_statistics(x, indices, codes)

    def ema(module):
        state = codebook.clone(), torch.ones(codes), codebook.clone()

        def step():
            module.ema_update_(*state, counts, sums, decay=0.99, metric="l2")
            return state

        return step

    def check(results):
        for actual, expected in zip(results["native"], results["twin"]):
            assert_close(actual, expected, 1e-5)

    made = statistics if op == "code_statistics" else ema
    calls = {"native": made(ops), "twin": made(reference)}
    return Problem(op, f"{size}: N {rows}, K {codes}, D {width}", calls, check)


@pytest.mark.parametrize("name", [f"{op}, {size}" for op in ("code_statistics", "ema_update_") for size in SIZES])
def bench_statistics(benchmark, name):
    compare(benchmark, "bench_statistics", name)
