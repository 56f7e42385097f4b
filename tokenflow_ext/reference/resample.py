"""Resampling of maps as small separable matrices: area down, bicubic up.

Both are linear and separable, so a map x [B, h, w, C] becomes M_h x M_w^T with two 1-D matrices
[n_out, n_in]. Each weight is computed in float64 with plain arithmetic in a fixed order, then rounded
once to the working type, so that any backend that repeats the arithmetic gets the same bits.
Where n_out = n_in both matrices are exact identities.
"""

from functools import cache

import torch
from torch import Tensor

CUBIC = -0.75
"""The sharpness a of Keys' cubic kernel, the value of image libraries and of `F.interpolate`."""


def area_weights(n_in: int, n_out: int) -> list[list[float]]:
    """Adaptive average: row i is 1/n over the window floor(i n_in/n_out) .. ceil((i+1) n_in/n_out).

    Args:
        n_in: samples read.
        n_out: samples written.

    Returns:
        Weights [n_out][n_in] in float64.

    Example:
        >>> area_weights(4, 2)
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    rows = []
    for i in range(n_out):
        first, last = i * n_in // n_out, -(-(i + 1) * n_in // n_out)
        rows.append([1.0 / (last - first) if first <= j < last else 0.0 for j in range(n_in)])
    return rows


def cubic_taps(t: float) -> tuple[float, float, float, float]:
    """Keys' cubic weights of the four samples around a point at fraction t past the second one."""

    def near(d: float) -> float:
        return ((CUBIC + 2.0) * d - (CUBIC + 3.0)) * d * d + 1.0

    def far(d: float) -> float:
        return ((CUBIC * d - 5.0 * CUBIC) * d + 8.0 * CUBIC) * d - 4.0 * CUBIC

    return far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)


def bicubic_weights(n_in: int, n_out: int) -> list[list[float]]:
    """Cubic interpolation, a = -0.75, align_corners False, samples beyond the border clamped to it.

    Output i reads position ((2 i + 1) n_in - n_out) / (2 n_out), kept as an integer quotient and
    remainder so that its fraction is rounded once; taps that clamp onto one sample add up in tap order.

    Args:
        n_in: samples read.
        n_out: samples written.

    Returns:
        Weights [n_out][n_in] in float64.

    Example:
        >>> bicubic_weights(1, 2)
        [[1.0], [1.0]]
    """
    rows = []
    for i in range(n_out):
        base, rest = divmod((2 * i + 1) * n_in - n_out, 2 * n_out)
        row = [0.0] * n_in
        for tap, weight in enumerate(cubic_taps(rest / (2 * n_out))):
            row[min(max(base - 1 + tap, 0), n_in - 1)] += weight
        rows.append(row)
    return rows


@cache
def _matrix(rule: str, n_in: int, n_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    weights = {"area": area_weights, "bicubic": bicubic_weights}[rule](n_in, n_out)
    return torch.tensor(weights, dtype=torch.float64).to(device, dtype)


def resample(x: Tensor, size: tuple[int, int], rule: str) -> Tensor:
    """M_h x M_w^T for every channel of x.

    A value that is not a number reaches exactly the outputs whose weights touch it, as NaN, and gets no
    gradient: a dense product would spread 0 * NaN over the whole row.

    Args:
        x: maps [B, h, w, C], float32 or float64.
        size: (h, w) of the result.
        rule: "area" or "bicubic".

    Returns:
        Maps [B, size[0], size[1], C] of x's type.

    Example:
        >>> resample(torch.ones(1, 4, 4, 3), (2, 2), "area").shape
        torch.Size([1, 2, 2, 3])
    """
    rows = _matrix(rule, x.shape[1], size[0], x.dtype, x.device)
    columns = _matrix(rule, x.shape[2], size[1], x.dtype, x.device)

    def apply(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("ph,qw,bhwc->bpqc", rows, columns, x)

    finite = x.isfinite()
    clean = apply(rows, columns, torch.where(finite, x, 0.0))
    if finite.all():
        return clean
    touched = apply((rows != 0).to(x.dtype), (columns != 0).to(x.dtype), (~finite).to(x.dtype)) > 0
    return torch.where(touched, torch.nan, clean)
