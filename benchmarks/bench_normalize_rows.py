"""normalize_rows, forward and forward + backward, against torch.nn.functional.normalize. Memory-bound."""

import pytest
import torch
import torch.nn.functional as F
from harness import Problem, assert_close, compare, normal

from tokenflow_ext import ops

SIZES = {"a million rows of 8": (2**20, 8), "a million rows of 32": (2**20, 32), "VQGAN": (16384, 256)}


def problem(name: str) -> Problem:
    """`name` is "forward" or "forward + backward" and one of SIZES."""
    direction, size = name.split(", ")
    rows, width = SIZES[size]
    x, upstream = normal(rows, width, seed=1), normal(rows, width, seed=2)

    def forward(normalize):
        with torch.no_grad():
            return (normalize(x),)

    def both(normalize):
        leaf = x.detach().requires_grad_()
        y = normalize(leaf)
        return y, *torch.autograd.grad(y, leaf, upstream)

    def check(results):
        for actual, expected in zip(results["native"], results["F.normalize"]):
            assert_close(actual, expected, 1e-5)

    step, passes = (forward, 2) if direction == "forward" else (both, 5)
    calls = {
        "native": lambda: step(ops.normalize_rows),
        "F.normalize": lambda: step(lambda t: F.normalize(t, dim=-1)),
    }
    moved = 4 * rows * width * passes
    return Problem(
        f"normalize_rows, {direction}", f"{size}: N {rows}, D {width}", calls, check, bytes=moved, keeps_memory=True
    )


@pytest.mark.parametrize("name", [f"{d}, {size}" for d in ("forward", "forward + backward") for size in SIZES])
def bench_normalize_rows(benchmark, name):
    compare(benchmark, "bench_normalize_rows", name)
