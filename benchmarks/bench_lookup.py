"""lookup, forward and forward + backward, against its twin: PyTorch's indexing. Memory-bound."""

import pytest
import torch
from harness import Problem, assert_close, compare, normal

from tokenflow_ext import ops, reference

# rows, groups, codes, width
SIZES = {
    "TokenFlow's pixel table": (16384, 0, 32768, 8),
    "a million rows of 8": (2**20, 0, 32768, 8),
    "VAR": (65536, 0, 4096, 32),
    "a million rows of 32": (2**20, 0, 8192, 32),
    "VQGAN": (16384, 0, 16384, 256),
    "UniTok": (16384, 8, 4096, 8),
}


def problem(name: str) -> Problem:
    """`name` is "forward" or "forward + backward" and one of SIZES."""
    direction, size = name.split(", ")
    rows, groups, codes, width = SIZES[size]
    shape = (groups,) if groups else ()
    codebook = normal(*shape, codes, width, seed=1)
    indices = torch.randint(codes, (rows, *shape), generator=torch.Generator().manual_seed(2))
    upstream = normal(rows, *shape, width, seed=3)
    pairs, table = rows * (groups or 1), codes * (groups or 1)
    moved = 8 * pairs + 4 * width * (min(pairs, table) + pairs)

    def forward(module):
        with torch.no_grad():
            return (module.lookup(indices, codebook),)

    def both(module):
        leaf = codebook.detach().requires_grad_()
        found = module.lookup(indices, leaf)
        return found, *torch.autograd.grad(found, leaf, upstream)

    def check(results):
        assert torch.equal(results["native"][0], results["twin"][0])
        for gradient, expected in zip(results["native"][1:], results["twin"][1:]):
            assert_close(gradient, expected, 1e-5)

    step = forward
    if direction == "forward + backward":
        step, moved = both, moved + 8 * pairs + 4 * width * (pairs + table)
    size = f"{size}: N {rows}, " + (f"G {groups}, " if groups else "") + f"K {codes}, D {width}"
    calls = {"native": lambda: step(ops), "twin": lambda: step(reference)}
    return Problem(f"lookup, {direction}", size, calls, check, bytes=moved, keeps_memory=True)


@pytest.mark.parametrize("name", [f"{d}, {size}" for d in ("forward", "forward + backward") for size in SIZES])
def bench_lookup(benchmark, name):
    compare(benchmark, "bench_lookup", name)
