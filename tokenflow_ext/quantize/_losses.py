"""Means of squares over the entries that count."""

from torch import Tensor, where

from tokenflow_ext.ops import _check


def square_sum(a: Tensor, b: Tensor, keep: Tensor) -> Tensor:
    """sum (a - b)^2 over the entries where `keep`, which broadcasts, holds; what it leaves out passes no NaN on."""
    return where(keep, a - b, 0.0).square().sum()


def mean_square(a: Tensor, b: Tensor, good: Tensor) -> Tensor:
    """mean((a - b)^2) over all entries of [..., D]; rows where `good` [...] is False add 0, and no rows give 0."""
    return square_sum(a, b, good.unsqueeze(-1)) / max(_check.count(a.shape), 1)


def two_sided(quantizer, code: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """codebook_weight sum (code - sg target)^2 + commitment_weight sum (sg code - target)^2 over the entries to keep."""
    to_code, to_target = square_sum(code, target.detach(), keep), square_sum(code.detach(), target, keep)
    return quantizer.codebook_weight * to_code + quantizer.commitment_weight * to_target
