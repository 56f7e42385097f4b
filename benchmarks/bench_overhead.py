"""What a call costs when there is next to nothing to do: every op on a few rows, against its twin."""

import pytest
import torch
from harness import Problem, assert_close, compare, normal

from tokenflow_ext import ops, reference

ROWS, CODES, WIDTH = 1, 1024, 8


def _calls(module) -> dict:
    """The ops by name."""
    x, codebook, sums = normal(ROWS, WIDTH, seed=1), normal(CODES, WIDTH, seed=2), normal(CODES, WIDTH, seed=3)
    indices, counts = torch.full((ROWS,), 7), torch.ones(CODES)
    state = codebook.clone(), counts.clone(), codebook.clone()
    leaves = x.clone().requires_grad_(), codebook.clone().requires_grad_()

    def backward():
        out = module.quantize(*leaves)
        return *out, *torch.autograd.grad(out.loss, leaves)

    return {
        "nearest_code": lambda: module.nearest_code(x, codebook),
        "quantize": lambda: module.quantize(x, codebook),
        "quantize, forward + backward": backward,
        "lookup": lambda: module.lookup(indices, codebook),
        "normalize_rows": lambda: module.normalize_rows(x),
        "code_statistics": lambda: module.code_statistics(x, indices, CODES),
        "ema_update_": lambda: module.ema_update_(*state, counts, sums, decay=0.99),
    }


OPS = list(_calls(ops))


def problem(name: str) -> Problem:
    """`name` is one of OPS."""

    def flat(results):
        return [r for r in (results if isinstance(results, (tuple, list)) else [results]) if r is not None]

    def check(results):
        for actual, expected in zip(flat(results["native"]), flat(results["twin"])):
            assert_close(actual.float(), expected.float())

    calls = {"native": _calls(ops)[name], "twin": _calls(reference)[name]}
    return Problem(f"overhead, {name}", f"N {ROWS}, K {CODES}, D {WIDTH}", calls, check)


@pytest.mark.parametrize("name", OPS)
def bench_overhead(benchmark, name):
    compare(benchmark, "bench_overhead", name)
