"""shared_quantize at TokenFlow's size: against its twin, and against TokenFlow's own expression."""

import pytest
import torch
from harness import Problem, assert_close, assert_same_ids, compare, normal
from tokenflow_expression import tokenflow_quantize

from tokenflow_ext import ops, reference

CODES, WIDTHS = 32768, (32, 8)
TOKENFLOW = "TokenFlow's expression"


def forward(xs, tables):
    """The calls in eval, without a graph."""

    def plain():
        quantized, indices, _ = tokenflow_quantize(*xs, *tables, training=False)
        return quantized, indices

    def by(module):
        out = module.shared_quantize(xs, tables)
        return torch.cat(out.quantized, -1), out.indices

    return plain, by


def forward_backward(xs, tables, upstream):
    """The calls in training: values, ids, loss, and the gradients of rows and tables."""

    def gradients(step):
        inputs = [t.detach().requires_grad_() for t in (*xs, *tables)]
        quantized, indices, loss = step(inputs[:2], inputs[2:])
        return (quantized, indices, loss, *torch.autograd.grad((quantized, loss), inputs, (upstream, torch.ones(()))))

    def by(module):
        def step(xs, tables):
            out = module.shared_quantize(xs, tables)
            return torch.cat(out.quantized, -1), out.indices, out.loss

        return gradients(step)

    return (lambda: gradients(lambda xs, tables: tokenflow_quantize(*xs, *tables, training=True))), by


# rows, forward alone; the expression's backward would need 20 GB at 16384 rows
SIZES = {
    "64 images": (16384, True),
    "16 images": (4096, True),
    "16 images, training": (4096, False),
    "1 image, training": (256, False),
}


def problem(name: str) -> Problem:
    """`name` is one of SIZES."""
    rows, alone = SIZES[name]
    xs = [normal(rows, w, seed=w) for w in WIDTHS]
    tables = [torch.nn.functional.normalize(normal(CODES, w, seed=w + 1), dim=-1) for w in WIDTHS]
    if alone:
        plain, by = forward(xs, tables)
        without = torch.no_grad()
        plain, by = without(plain), without(by)
    else:
        plain, by = forward_backward(xs, tables, normal(rows, sum(WIDTHS), seed=9) / rows)

    def check(results):
        quantized, indices, *rest = results["native"]
        for rival in set(results) - {"native"}:
            other_quantized, other_indices, *other_rest = results[rival]
            equal = assert_same_ids(indices, other_indices, xs, tables, "cosine")
            assert_close(quantized[equal], other_quantized[equal])
            if not rest:
                continue
            assert_close(rest[0], other_rest[0])
            for gradient, other in zip(rest[1:3], other_rest[1:3]):
                assert_close(gradient[equal], other[equal])
            ties = torch.cat([indices[~equal], other_indices[~equal]])
            codes = torch.ones(CODES, dtype=torch.bool).index_fill_(0, ties, False)
            for gradient, other in zip(rest[3:], other_rest[3:]):
                assert_close(gradient[codes], other[codes])

    calls = {"native": lambda: by(ops), "twin": lambda: by(reference), TOKENFLOW: plain}
    if rows > 4096:
        del calls["twin"]  # half a minute that says no more than at 4096 rows
    op = "shared_quantize, " + ("forward" if alone else "forward + backward")
    size = f"{name}: N {rows}, K {CODES}, D {WIDTHS[0]} + {WIDTHS[1]}, cosine"
    return Problem(op, size, calls, check, flop=2 * rows * CODES * sum(WIDTHS))


@pytest.mark.parametrize("name", SIZES)
def bench_shared_quantize(benchmark, name):
    compare(benchmark, "bench_shared_quantize", name)
