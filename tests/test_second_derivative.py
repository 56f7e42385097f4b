"""Kernels and twins alike are differentiable once: a second derivative is an error, never a zero."""

import pytest
import torch
from harness import leaves, normal

from tokenflow_ext import ops

IDS, GRID_IDS = torch.tensor([0, 3, 3, 1]), torch.tensor([[0, 1, 2, 3, 1], [3, 2, 1, 0, 0]])
MAPS = {"scales": (1, 2), "metric": "cosine"}
ACCUMULATED, CHAIN = {**MAPS, "loss_on": "accumulated"}, {**MAPS, "rule": "chain"}
CALLS = {  # from rows [4, 3], codes [5, 3], maps [2, 3, 4, 4]
    "normalize_rows": lambda x, c, m, **o: ops.normalize_rows(x, **o),
    "lookup": lambda x, c, m, **o: ops.lookup(IDS, c, **o),
    "shared_lookup": lambda x, c, m, **o: ops.shared_lookup(IDS, [c], **o)[0],
    "quantize": lambda x, c, m, **o: ops.quantize(x, c, **o).loss,
    "shared_quantize": lambda x, c, m, **o: ops.shared_quantize([x], [c], **o).loss,
    "entropy_loss": lambda x, c, m, **o: ops.entropy_loss(x, c, metric="l2", temperature=1.0, **o)[0],
    "soft_quantize": lambda x, c, m, **o: ops.soft_quantize(x, c, c, **o)[0],
    "multiscale_quantize": lambda x, c, m, **o: ops.multiscale_quantize(m, [c], **MAPS, **o).loss,
    "multiscale_rows": lambda x, c, m, **o: ops.multiscale_rows(m, GRID_IDS, [c], **MAPS, **o),
    "multiscale_decode": lambda x, c, m, **o: ops.multiscale_decode(GRID_IDS, [c], size=4, **MAPS, **o),
    "multiscale_inputs": lambda x, c, m, **o: ops.multiscale_inputs(GRID_IDS, [c], size=4, rule="chain", **MAPS, **o),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_second_derivative_is_an_error(name, backend):
    inputs = leaves(normal(4, 3, seed=1), normal(5, 3, seed=2), normal(2, 3, 4, 4, seed=3))
    value = CALLS[name](*inputs, backend=backend).square().sum()
    plain = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    reached = [x for x, gradient in zip(inputs, plain) if gradient is not None]
    assert reached
    first = torch.autograd.grad(value, reached, create_graph=True)
    for gradient, expected in zip(first, (g for g in plain if g is not None)):
        assert torch.equal(gradient, expected)
    for gradient in first:
        with pytest.raises(RuntimeError, match=": it is differentiable once"):
            torch.autograd.grad(gradient.sum(), reached, retain_graph=True, allow_unused=True)


ON_THE_CODES = {  # whose gradient to the codes depends on the codes, however it is asked for
    "quantize": lambda x, c, m, **o: ops.quantize(x, c, **o).loss,
    "shared_quantize": lambda x, c, m, **o: ops.shared_quantize([x, x], [c, c], **o).loss,
    "multiscale_quantize": lambda x, c, m, **o: ops.multiscale_quantize(m, [c], **MAPS, **o).loss,
    "accumulated": lambda x, c, m, **o: ops.multiscale_quantize(m, [c], **ACCUMULATED, **o).loss,
    "multiscale_decode": lambda x, c, m, **o: ops.multiscale_decode(GRID_IDS, [c], size=4, **MAPS, **o).sum(),
    "multiscale_inputs": lambda x, c, m, **o: ops.multiscale_inputs(GRID_IDS, [c], size=4, **CHAIN, **o).sum(),
    "entropy_loss": lambda x, c, m, **o: ops.entropy_loss(x, c, metric="l2", temperature=1.0, **o)[0],
    "soft_quantize": lambda x, c, m, **o: ops.soft_quantize(x, c, x, **o)[0].sum(),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ON_THE_CODES)
def test_a_penalty_on_the_gradient_of_the_codes_alone_is_an_error(name, backend):
    """Nothing else requires grad, so that no other way leads to the refusal."""
    x, c, m = normal(5, 3, seed=1), normal(5, 3, seed=2).requires_grad_(), normal(2, 3, 4, 4, seed=3)
    value = ON_THE_CODES[name](x, c, m, backend=backend)
    (first,) = torch.autograd.grad(value, c, create_graph=True)
    with pytest.raises(RuntimeError, match=": it is differentiable once"):
        (value + first.square().sum()).backward()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_sentence_names_the_op(backend):
    x, codebook, _ = leaves(normal(4, 3, seed=1), normal(5, 3, seed=2), normal(2, 3, 4, 4, seed=3))
    (first,) = torch.autograd.grad(ops.quantize(x, codebook, backend=backend).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="quantize: it is differentiable once, a second derivative was asked for"):
        torch.autograd.grad(first.sum(), x)
