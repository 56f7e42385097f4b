"""Drawing of token ids from logits: top-k, top-p, one random stream a picture."""

from __future__ import annotations

import torch
from torch import Tensor


def limit(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """logits [..., K] with -inf outside the `top_k` best (0: all) and outside the smallest set whose probability reaches `top_p`.

    The best is always kept; ties with the last of the top_k are kept too.

    Example:
        >>> limit(torch.tensor([0.0, 2.0, 1.0]), top_k=2, top_p=1.0).tolist()
        [-inf, 2.0, 1.0]
    """
    if 0 < top_k < logits.shape[-1]:
        worst = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(-1)
        outside = share.cumsum(-1) - share >= top_p
        outside[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One index from softmax(logits) a row: [..., K] -> int64 [...]."""
    share = logits.softmax(-1).flatten(0, -2)
    return torch.multinomial(share, 1, generator=generator).view(logits.shape[:-1])
