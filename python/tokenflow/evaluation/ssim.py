"""Structural similarity with a uniform window.

    SSIM = mean of (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2)),   c1 = (0.01 R)^2, c2 = (0.03 R)^2

over all whole 7 x 7 windows of all channels, values in [0, 1], variances with n - 1. R is the range of the values: 1. The
published TokenFlow numbers use R = 2 on the same values, which makes c1 and c2 four times larger and the result closer to 1.

Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 2004.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

WINDOW = 7


def ssim(images: Tensor, originals: Tensor, *, data_range: float = 1.0) -> Tensor:
    """SSIM [B] of images [B, 3, H, W] in [-1, 1], which are measured on [0, 1], in float64.

    Args:
        images: reconstructions.
        originals: of the same shape.
        data_range: R.

    Raises:
        ValueError: the shapes differ, or are smaller than a window.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 300).view(1, 3, 10, 10)
        >>> ssim(x, x).item(), round(ssim(-x, x).item(), 3) < 0
        (1.0, True)
    """
    if images.shape != originals.shape or images.dim() != 4 or min(images.shape[2:]) < WINDOW:
        raise ValueError(
            f"ssim: images: wanted two [B, C, H, W] of at least {WINDOW} x {WINDOW}, got {list(images.shape)} and {list(originals.shape)}"
        )
    x, y = ((t.double() + 1) / 2 for t in (images, originals))
    mean = lambda t: F.avg_pool2d(t, WINDOW, 1)  # noqa: E731
    mx, my = mean(x), mean(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    vx, vy, vxy = (
        sample * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
    )
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean((1, 2, 3))
