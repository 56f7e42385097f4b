"""lookup against its twin, PyTorch's indexing, forward + backward."""

import pytest
import torch
from harness import Problem, assert_close, compare, normal

from tokenflow_ext import ops, reference

# rows, groups, codes, width
SIZES = {"VAR": (65536, 0, 4096, 32), "UniTok": (16384, 8, 4096, 8)}


def problem(name: str) -> Problem:
    """`name` is one of SIZES."""
    rows, groups, codes, width = SIZES[name]
    shape = (groups,) if groups else ()
    codebook = normal(*shape, codes, width, seed=1)
    indices = torch.randint(codes, (rows, *shape), generator=torch.Generator().manual_seed(2))
    upstream = normal(rows, *shape, width, seed=3)

    def step(module):
        table = codebook.detach().requires_grad_()
        found = module.lookup(indices, table)
        return found, *torch.autograd.grad(found, table, upstream)

    def check(results):
        assert torch.equal(results["native"][0], results["twin"][0])
        assert_close(results["native"][1], results["twin"][1], 1e-5)

    size = f"{name}: N {rows}, " + (f"G {groups}, " if groups else "") + f"K {codes}, D {width}"
    return Problem(
        "lookup, forward + backward", size, {"native": lambda: step(ops), "twin": lambda: step(reference)}, check
    )


@pytest.mark.parametrize("name", SIZES)
def bench_lookup(benchmark, name):
    compare(benchmark, "bench_lookup", name)
