"""CLIP's contrastive loss, with the negatives of every rank.

    L = 1/2 (CE(s I T^T, diagonal) + CE(s T I^T, diagonal)),   s = exp(logit_scale), logit_scale in [0, log 100]

I, T are unit rows [N, D] of all ranks together, in float32. A rank's loss is W/N times the sum over its own rows (W ranks), so
that the mean over ranks, values and gradients alike, is the loss of one process on the whole, whatever rows each rank has.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tokenflow.losses import _check

LOGIT_SCALE = math.log(1 / 0.07)
"""Where logit_scale starts."""
LARGEST = math.log(100)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor | float, *, local_loss: bool = True) -> Tensor:
    """The loss of matching rows, 0-dim. Where torch.distributed is initialised every rank has to call it.

    Average the gradients over ranks, as DDP does. No rows at all give 0.

    Args:
        image: [B, D], unit rows; B may differ between ranks and be 0.
        text: [B, D], row b belongs to image b.
        scale: s, exponentiated; 0-dim or a number.
        local_loss: each rank scores its own rows against all, [B, N]; otherwise every rank computes the whole [N, N], which
            gives each the same loss, and the same gradients after averaging.

    Raises:
        TypeError: not floats.
        ValueError: shapes that are not [B, D], or differ.

    Example:
        >>> rows = torch.eye(3)
        >>> contrastive_loss(rows, rows, 1.0)
        tensor(0.5514)
        >>> contrastive_loss(rows[:1], rows[:1], 100.0)
        tensor(0.)
    """
    for name, value in (("image", image), ("text", text)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"contrastive_loss: {name}: wanted a tensor of floats, got {got}")
        if value.dim() != 2:
            raise ValueError(f"contrastive_loss: {name}: wanted [B, D], got {list(value.shape)}")
    _check.alike("contrastive_loss", "text", text, image)
    with torch.autocast(image.device.type, enabled=False):
        if torch.float64 not in (image.dtype, text.dtype):
            image, text = image.float(), text.float()
        whole, first, world = gather(torch.cat([image, text], dim=1))
        images, texts = whole.split(image.shape[1], dim=1)
        count = len(whole)
        if not local_loss:
            image, text, first, world = images, texts, 0, 1
        labels = torch.arange(first, first + len(image), device=image.device)
        if not count:
            return whole.sum()
        pairs = ((image, texts), (text, images))
        sums = [F.cross_entropy(scale * rows @ others.T, labels, reduction="sum") for rows, others in pairs]
        return (sums[0] + sums[1]) * (world / (2 * count))


@torch.no_grad()
def clamp_logit_scale_(logit_scale: Tensor) -> None:
    """logit_scale <- clamp(logit_scale, 0, log 100), to be called after each step of the optimiser.

    Example:
        >>> scale = torch.nn.Parameter(torch.tensor(7.0))
        >>> clamp_logit_scale_(scale)
        >>> round(float(scale.detach().exp()), 3)
        100.0
    """
    logit_scale.clamp_(0.0, LARGEST)


def gather(rows: Tensor) -> tuple[Tensor, int, int]:
    """(rows [N, D] of all ranks, rank 0's first; where this rank's begin; number of ranks), with gradient.

    Args:
        rows: [B, D]; B may differ between ranks.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows, 0, 1
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = torch.zeros(world, dtype=torch.int64, device=rows.device)
    counts[rank] = len(rows)
    dist.all_reduce(counts)
    counts = counts.tolist()
    return _Gather.apply(rows, counts, rank), sum(counts[:rank]), world


class _Gather(torch.autograd.Function):
    """[B_r, D] on rank r -> [sum B_r, D]; backward sums over ranks what each wants of a row."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        # Collectives want equal shapes.
        padded = rows.new_zeros((max(counts), rows.shape[1]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[ctx.rank], None, None
