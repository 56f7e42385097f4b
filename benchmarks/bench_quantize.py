"""quantize against its twin, forward + backward: search, straight-through, loss, and the gradients of rows and codes."""

import pytest
import torch
from harness import Problem, assert_close, assert_same_ids, compare, normal

from tokenflow_ext import ops, reference

# rows, groups, codes, width, metric
SIZES = {
    "LlamaGen": (4096, 0, 16384, 8, "cosine"),
    "VAR": (4096, 0, 4096, 32, "l2"),
    "UniTok": (2048, 8, 4096, 8, "cosine"),
}


def problem(name: str) -> Problem:
    """`name` is one of SIZES."""
    rows, groups, codes, width, metric = SIZES[name]
    shape = (groups,) if groups else ()
    x, codebook = normal(rows, *shape, width, seed=1), normal(*shape, codes, width, seed=2)
    upstream = normal(rows, *shape, width, seed=3) / rows

    def step(module):
        inputs = [x.detach().requires_grad_(), codebook.detach().requires_grad_()]
        out = module.quantize(*inputs, metric=metric)
        return (*out, *torch.autograd.grad((out.quantized, out.loss), inputs, (upstream, torch.ones(()))))

    def check(results):
        native, twin = ([t.detach() for t in results[p]] for p in ("native", "twin"))
        assert_close(native[2], twin[2])
        for g in range(groups or 1):
            pick = (lambda t: t[:, g]) if groups else (lambda t: t)
            rows_of, codes_of = pick(x), codebook[g] if groups else codebook
            equal = assert_same_ids(pick(native[1]), pick(twin[1]), [rows_of], [codes_of], metric)
            for value in (0, 3):
                assert_close(pick(native[value])[equal], pick(twin[value])[equal])
            ties = torch.cat([pick(native[1])[~equal], pick(twin[1])[~equal]])
            kept = torch.ones(codes, dtype=torch.bool).index_fill_(0, ties, False)
            assert_close(*((t[4][g] if groups else t[4])[kept] for t in (native, twin)))

    size = f"{name}: N {rows}, " + (f"G {groups}, " if groups else "") + f"K {codes}, D {width}, {metric}"
    return Problem(
        "quantize, forward + backward", size, {"native": lambda: step(ops), "twin": lambda: step(reference)}, check
    )


@pytest.mark.parametrize("name", SIZES)
def bench_quantize(benchmark, name):
    compare(benchmark, "bench_quantize", name)
