"""Sampling of a VAR: one pass a scale with cached keys and values, guided by the difference that the class makes.

logits = (1 + t) logits(class) - t logits(no class),   t = guidance s / (S - 1) at scale s = 0 .. S - 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenflow.sampling import draw, limit

if TYPE_CHECKING:
    from tokenflow.models.var import VAR
    from tokenflow.models.vqvae import VQVAE


@torch.no_grad()
def sample(
    model: VAR,
    tokenizer: VQVAE,
    labels: Sequence[int] | Tensor,
    *,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seed: int = 0,
) -> Tensor:
    """Token ids [B, L] of classes; every picture has a random stream of its own, so that it does not depend on the batch.

    Args:
        model: in eval mode.
        tokenizer: whose ids these are.
        labels: B class ids; `model.config.classes` means none.
        guidance: 0 draws from the class's logits alone. Published: 1.5 for FID, 4 for pictures to look at.
        top_k: codes that may be drawn; 0 means all. Published: 900.
        top_p: smallest set of codes whose probability reaches it, in (0, 1]. Published: 0.96 for FID, 0.95 to look at.
        seed: of picture 0; picture i has seed + i.

    Raises:
        ValueError: a label that is no class, or guidance, top_k or top_p out of range.
    """
    classes, device = model.config.classes, model.positions.device
    labels = torch.as_tensor(labels, dtype=torch.int64, device=device).reshape(-1)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(f"sample: labels: wanted 0 to {classes - 1}, or {classes} for none, got {labels.tolist()}")
    for name, value, fine, wanted in (
        ("guidance", guidance, guidance >= 0, "a number >= 0"),
        ("top_k", top_k, top_k >= 0, "0 for all codes or a count"),
        ("top_p", top_p, 0 < top_p <= 1, "a number in (0, 1]"),
    ):
        if not fine:
            raise ValueError(f"sample: {name}: wanted {wanted}, got {value}")
    batch, last = len(labels), len(model.lengths) - 1
    both = torch.cat([labels, torch.full_like(labels, classes)]) if guidance else labels
    streams = [torch.Generator(device).manual_seed(seed + i) for i in range(batch)]
    cache = [None] * model.config.depth
    tokens = torch.empty(batch, 0, dtype=torch.int64, device=device)
    for scale, length in enumerate(model.lengths):
        inputs = model.inputs(tokenizer, tokens)[:, -length:] if scale else None
        if inputs is not None and guidance:
            inputs = inputs.repeat(2, 1, 1)
        logits = model.step(both, inputs, scale, cache).float()
        if guidance:
            t = guidance * scale / max(1, last)
            logits = (1 + t) * logits[:batch] - t * logits[batch:]
        logits = limit(logits, top_k=top_k, top_p=top_p)
        drawn = [draw(row, stream) for row, stream in zip(logits, streams, strict=True)]
        tokens = torch.cat([tokens, torch.stack(drawn) if drawn else tokens.new_empty(0, length)], dim=1)
    return tokens
