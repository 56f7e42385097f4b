"""normalize_rows: the canonical normalisation as an op of its own, so that a decoded code is the searched code bit for bit."""

import torch

from tokenflow_ext import reference
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import _C, LIBRARY, define, define_backward, threads, use_native, view


def _normalize_rows(x):
    x = x.contiguous()
    y = torch.empty_like(x)
    _C.normalize_rows(view(x), view(y), threads())
    return y


def _normalize_rows_backward(x, grad_y):
    x, grad_y = x.contiguous(), grad_y.contiguous()
    grad_x = torch.empty_like(x)
    _C.normalize_rows_backward(view(x), view(grad_y), view(grad_x), threads())
    return grad_x


define("normalize_rows(Tensor x) -> Tensor", _normalize_rows, lambda x: x.new_empty(x.shape))
define_backward(
    "normalize_rows_backward(Tensor x, Tensor grad_y) -> Tensor",
    _normalize_rows_backward,
    lambda x, grad_y: x.new_empty(x.shape),
)
torch.library.register_autograd(
    "tokenflow_ext::normalize_rows",
    lambda ctx, grad: torch.ops.tokenflow_ext.normalize_rows_backward(ctx.saved_tensors[0], grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    lib=LIBRARY,
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
    if not use_native("normalize_rows", backend, x.device):
        return reference.normalize_rows(x)
    rows = x.reshape(_check.count(x.shape[:-1]), x.shape[-1])
    return torch.ops.tokenflow_ext.normalize_rows(rows).reshape(x.shape)
