"""How close decoded pictures are to the originals, and how the codebook is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B]: 10 log10(4 / mean (x' - x)^2) for images [B, 3, H, W] in [-1, 1].

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> x = torch.zeros(1, 3, 4, 4)
        >>> round(psnr(x + 0.2, x).item(), 2)
        20.0
    """
    if images.shape != originals.shape or images.dim() != 4:
        raise ValueError(
            f"psnr: images: wanted two [B, C, H, W] of one shape, got {list(images.shape)} and {list(originals.shape)}"
        )
    error = (images.float() - originals.float()).square().mean((1, 2, 3)).clamp(min=1e-10)
    return 10 * (4.0 / error).log10()


@torch.inference_mode()
def perceptual(metric: nn.Module, images: Tensor, originals: Tensor, *, batch: int = 32) -> float:
    """Mean distance of `metric` over all pictures, in chunks."""
    pairs = zip(images.split(batch), originals.split(batch), strict=True)
    return float(torch.cat([metric(a, b) for a, b in pairs]).mean())


def code_use(indices: Tensor, codes: int) -> tuple[Tensor, float, float]:
    """Hits of each code [K], the share of codes hit, and the perplexity exp(H) of the hits.

    Example:
        >>> hits, share, perplexity = code_use(torch.tensor([[0, 1, 1, 0]]), 4)
        >>> hits.tolist(), share, round(perplexity, 4)
        ([2, 2, 0, 0], 0.5, 2.0)
    """
    hits = torch.bincount(indices.flatten(), minlength=codes)
    return hits, *used(hits)


def used(hits: Tensor) -> tuple[float, float]:
    """Share of the codes that were hit and perplexity exp(H), from hits [K]."""
    p = hits.double() / hits.sum()
    return float((hits > 0).double().mean()), float(torch.exp(-torch.special.xlogy(p, p).sum()))
