"""How a quantized value passes its gradient to what was quantized: as it is, or turned with the vector (rotation trick)."""

from collections.abc import Sequence

import torch
from torch import Tensor

GRADIENTS = ("straight_through", "rotation")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(x.dtype, copy=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1].isfinite())

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.saved_tensors[0], grad, 0.0), None


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` bit for bit, cast to x's type, with d / dx = 1 (0 where it is not finite) and no gradient to the codes."""
    return _StraightThrough.apply(x, quantized.detach())


def turned_back(grad: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """(|q| / |y|) R^T grad of rows [..., D], R the rotation in the plane of y and q that takes y / |y| to q / |q|.

        R = I - 2 r r^T + 2 q' y'^T,   y' = y / |y|,  q' = q / |q|,  r = (y' + q') / |y' + q'|

    Where y and q are antiparallel no plane is given and R is the reflection I - 2 y' y'^T; where y is 0 there is no
    direction and the gradient passes as it is; where q is 0 it vanishes.
    """
    size, length = (v.norm(dim=-1, keepdim=True) for v in (y, q))
    y, q = y / size.clamp_min(1e-12), q / length.clamp_min(1e-12)
    r = torch.nn.functional.normalize(y + q, dim=-1, eps=1e-6)

    def along(a: Tensor) -> Tensor:
        return (grad * a).sum(-1, keepdim=True)

    turned = (grad - 2 * along(r) * r + 2 * along(q) * y) * (length / size.clamp_min(1e-12))
    return torch.where(size > 1e-12, turned, grad)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(quantized: Tensor, y: Tensor, widths: list[int]) -> Tensor:
        return quantized.clone()  # what is saved is not the user's to write to

    @staticmethod
    def setup_context(ctx, inputs, output):
        quantized, y, ctx.widths = inputs
        ctx.save_for_backward(quantized.to(y.dtype), y)

    @staticmethod
    def backward(ctx, grad):
        q, y = ctx.saved_tensors
        parts = zip(*(t.split(ctx.widths, dim=-1) for t in (grad.to(y.dtype), y, q)))
        return torch.cat([turned_back(*part) for part in parts], dim=-1).to(grad.dtype), None, None


def rotated(quantized: Tensor, y: Tensor, widths: Sequence[int]) -> Tensor:
    """`quantized` [..., C], whose gradient is turned table by table before it goes on to y, the rows as searched [..., C].

    Source: the rotation trick, arXiv 2410.06424.
    """
    return _Rotation.apply(quantized, y.detach(), list(widths))
