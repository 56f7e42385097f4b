"""Differentiable augmentation for discriminators: colour, translation, cutout, each picture with draws of its own.

    colour       x + b;  then m_c + s (x - m_c), m_c = mean over channels;  then m + k (x - m), m = mean of the picture
                 b ~ U(-1/2, 1/2),  s ~ U(0, 2),  k ~ U(1/2, 3/2)
    translation  by whole pixels, up to 1/8 of the side each way, zeros outside
    cutout       a rectangle of `cutout` times the sides, its centre anywhere in the picture, set to zero

Source: Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenflow.losses import _check

POLICY = ("colour", "translation", "cutout")
TRANSLATION = 1 / 8


def diffaug(
    images: Tensor,
    policy: tuple[str, ...] = POLICY,
    *,
    cutout: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1], augmented in the policy's order; the gradient reaches every pixel that is still seen.

    Args:
        images: [B, 3, H, W].
        policy: which of "colour", "translation", "cutout".
        cutout: side of the hole over the picture's, in [0, 1]; 0 cuts nothing.
        generator: of the draws, on the images' device; the default one by default.

    Raises:
        TypeError: images that are not floats.
        ValueError: another shape, an unknown word in the policy, or a cutout outside [0, 1].

    Example:
        >>> x = torch.rand(2, 3, 16, 16) * 2 - 1
        >>> a = diffaug(x, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(a, diffaug(x, generator=torch.Generator().manual_seed(0))), torch.equal(a, x)
        (True, False)
    """
    _check.images("diffaug", "images", images)
    for word in policy:
        _check.one_of("diffaug", "policy", word, POLICY)
    if not 0 <= cutout <= 1:
        raise ValueError(f"diffaug: cutout: wanted a number in [0, 1], got {cutout}")
    for word in policy if len(images) else ():
        if word == "colour":
            images = _colour(images, generator)
        elif word == "translation":
            images = _translate(images, generator)
        elif cutout:
            images = _cut(images, cutout, generator)
    return images


def _colour(x: Tensor, generator: torch.Generator | None) -> Tensor:
    draws = torch.rand(3, len(x), 1, 1, 1, generator=generator, device=x.device, dtype=x.dtype)
    x = x + (draws[0] - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * draws[1] * (x - grey)
    level = x.mean((1, 2, 3), keepdim=True)
    return level + (draws[2] + 0.5) * (x - level)


def _integers(x: Tensor, low: int, high: int, generator: torch.Generator | None) -> Tensor:
    """One number in [low, high] a picture: [B, 1]."""
    return torch.randint(low, high + 1, (len(x), 1), generator=generator, device=x.device)


def _translate(x: Tensor, generator: torch.Generator | None) -> Tensor:
    picture, rows, columns = (torch.arange(n, device=x.device) for n in (len(x), *x.shape[2:]))
    inside = []
    for axis, cells in ((2, rows), (3, columns)):
        most = round(x.shape[axis] * TRANSLATION)
        source = cells - _integers(x, -most, most, generator)
        inside.append((source, (source >= 0) & (source < len(cells))))
    (row, row_inside), (column, column_inside) = inside
    row, column = row.clamp(0, len(rows) - 1), column.clamp(0, len(columns) - 1)
    moved = x.permute(0, 2, 3, 1)[picture[:, None, None], row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
    seen = row_inside[:, :, None] & column_inside[:, None, :]
    return torch.where(seen[:, None], moved, 0)


def _cut(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    hole = []
    for axis in (2, 3):
        side = x.shape[axis]
        length = int(side * share + 0.5)
        # Centres of a hole of even length lie between pixels, at either border too.
        start = _integers(x, 0, side - length % 2, generator) - length // 2
        cells = torch.arange(side, device=x.device)
        hole.append((cells >= start) & (cells < start + length))
    return torch.where((hole[0][:, :, None] & hole[1][:, None, :])[:, None], 0, x)
