"""soft_quantize, forward + backward, against its twin and against IBQ's expression, both with N x K matrices under autograd.

Far rows: every code keeps a share, so all of backward's products have to be made. Near rows: a code and half as much noise,
as an encoder's outputs lie; few codes count.
"""

import pytest
import torch
from harness import Problem, assert_close, assert_same_ids, compare, normal

from tokenflow_ext import ops, reference

# rows, codes, width, whether rows lie near codes
SIZES = {
    "IBQ, near rows": (2048, 16384, 256, True),
    "IBQ, far rows": (2048, 16384, 256, False),
    "D 32, near rows": (2048, 16384, 32, True),
    "D 32, far rows": (2048, 16384, 32, False),
}


def one_hot_expression(x, keys, values):
    """(onehot - sg p + p) values, as it is published."""
    logits = x @ keys.T
    p, ids = logits.softmax(-1), logits.argmax(-1)
    hard = torch.zeros_like(p).scatter_(-1, ids[:, None], 1.0)
    return (hard - p.detach() + p) @ values, ids


def problem(name: str) -> Problem:
    """`name` is one of SIZES."""
    rows, codes, width, near = SIZES[name]
    codebook, noise = normal(codes, width, seed=2), normal(rows, width, seed=1)
    x = codebook[torch.arange(rows) * 7 % codes] + 0.5 * noise if near else noise
    upstream = normal(rows, width, seed=3)

    def step(function):
        leaves = [x.detach().requires_grad_(), codebook.detach().requires_grad_()]
        quantized, ids = function(leaves[0], leaves[1], leaves[1])
        return quantized, ids, *torch.autograd.grad(quantized, leaves, upstream)

    def check(results):
        native = results["native"]
        for rival in ("twin", "one-hot expression"):
            other = results[rival]
            equal = assert_same_ids(native[1], other[1], [x], [codebook], "dot")
            for value in (0, 2):
                assert_close(native[value][equal], other[value][equal])
            ties = torch.cat([native[1][~equal], other[1][~equal]])
            kept = torch.ones(codes, dtype=torch.bool).index_fill_(0, ties, False)
            assert_close(native[3][kept], other[3][kept])

    calls = {
        "native": lambda: step(ops.soft_quantize),
        "twin": lambda: step(reference.soft_quantize),
        "one-hot expression": lambda: step(one_hot_expression),
    }
    # Backward's logits for all pairs; where all count also those of the second pass, g.v twice, and two gradients.
    flop = (2 if near else 12) * rows * codes * width
    size = f"{name}: N {rows}, K {codes}, D {width}"
    return Problem("soft_quantize, forward + backward", size, calls, check, flop=flop)


@pytest.mark.parametrize("name", SIZES)
def bench_soft_quantize(benchmark, name):
    compare(benchmark, "bench_soft_quantize", name)
