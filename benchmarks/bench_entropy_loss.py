"""entropy_loss, forward + backward, against its twin, which is the dense expression: a few N x K matrices under autograd."""

import pytest
import torch
from harness import Problem, assert_close, compare, normal

from tokenflow_ext import ops, reference

# rows, codes, widths of the tables, groups, temperature
SIZES = {
    "pixel half": (4096, 32768, (8,), 0, 0.01),
    "TokenFlow": (4096, 32768, (32, 8), 0, 0.01),
    "UniTok": (2048, 4096, (8,), 8, 0.01),
    "soft": (4096, 32768, (8,), 0, 1.0),
}


def problem(name: str) -> Problem:
    """`name` is one of SIZES."""
    rows, codes, widths, groups, temperature = SIZES[name]
    shape = (groups,) if groups else ()
    xs = [normal(rows, *shape, width, seed=1) for width in widths]
    codebooks = [normal(*shape, codes, width, seed=2) for width in widths]

    def step(module):
        leaves = [t.detach().requires_grad_() for t in (*xs, *codebooks)]
        x, codebook = (leaves[0], leaves[1]) if len(widths) == 1 else (leaves[: len(widths)], leaves[len(widths) :])
        first, second = module.entropy_loss(x, codebook, metric="cosine", temperature=temperature)
        return first, second, *torch.autograd.grad(first - second, leaves)

    def check(results):
        """float32 logits near 2 / temperature are off by their rounding on both sides, and so is every p."""
        for actual, expected in zip(results["native"], results["twin"]):
            assert_close(actual, expected, 1e-3 if actual.dim() else 1e-4)

    size = f"{name}: N {rows}, " + (f"G {groups}, " if groups else "")
    size += f"K {codes}, D {' + '.join(map(str, widths))}, temperature {temperature}"
    # Logits, forward and backward; all else is needed only where p counts.
    flop = 4 * rows * (groups or 1) * codes * sum(widths)
    calls = {"native": lambda: step(ops), "twin": lambda: step(reference)}
    return Problem("entropy_loss, forward + backward", size, calls, check, flop=flop)


@pytest.mark.parametrize("name", SIZES)
def bench_entropy_loss(benchmark, name):
    compare(benchmark, "bench_entropy_loss", name)
