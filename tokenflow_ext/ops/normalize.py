"""normalize_rows: the canonical normalisation as an op of its own, so that a decoded code is the searched code bit for bit."""

import torch

from tokenflow_ext import reference
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import runs_on, use_native
from tokenflow_ext.ops._operator import define, define_autograd, define_backward


def _normalize_rows(x):
    x = x.contiguous()
    y = torch.empty_like(x)
    core, where = runs_on(x)
    core.normalize_rows(x, y, *where)
    return y


def _normalize_rows_backward(x, grad_y):
    x, grad_y = x.contiguous(), grad_y.contiguous()
    grad_x = torch.empty_like(x)
    core, where = runs_on(x)
    core.normalize_rows_backward(x, grad_y, grad_x, *where)
    return grad_x


NORMALIZE_ROWS = define("normalize_rows(Tensor x) -> Tensor", _normalize_rows, lambda x: x.new_empty(x.shape))
NORMALIZE_ROWS_BACKWARD = define_backward(
    "normalize_rows_backward(Tensor x, Tensor grad_y) -> Tensor",
    _normalize_rows_backward,
    lambda x, grad_y: x.new_empty(x.shape),
)
define_autograd(
    NORMALIZE_ROWS,
    lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    lambda ctx, grad: NORMALIZE_ROWS_BACKWARD(ctx.saved_tensors[0], grad),
)


def normalize_rows(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """y = x / max(|x|, 1e-12) over the last axis, in float32 (float64 for float64), then cast to x's type.

    Args:
        x: rows [..., D] of any float type.
        backend: "auto", "native" or "reference".

    Returns:
        y [..., D]. Differentiable once: dx = (g - (g.y) y) / |x|.

    Raises:
        TypeError: x is no float tensor.
        ValueError: x has no axis.

    Source: api.md, "Canonical score".

    Example:
        >>> normalize_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    _check.floating("normalize_rows", "x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"normalize_rows: x: wanted [..., D] with D >= 1, got {list(x.shape)}")
    if not use_native("normalize_rows", backend, x):
        return reference.normalize_rows(x)
    return NORMALIZE_ROWS(x)
