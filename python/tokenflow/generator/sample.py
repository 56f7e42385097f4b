"""Captions -> tokens -> images, one scale at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenflow.generator.model import Generator
from tokenflow.sampling import draw, limit

# Coarse scales decide what the picture is and may vary; the fine ones only fill it in.
TOP_K = (20, 20, 20, 3, 1)
TOP_P = 0.7
GUIDANCE = 1.0


@torch.inference_mode()
def sample_tokens(
    model: Generator,
    captions: Sequence[str],
    *,
    guidance: float = GUIDANCE,
    top_k: int | Sequence[int] = TOP_K,
    top_p: float = TOP_P,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Tokens of pictures for captions: int64 [B, L].

    At scale i of S the logits are (1 + t) cond - t null with t = guidance * i / (S - 1), cut by `limit` and drawn from. Each
    caption has its own random stream.

    Args:
        model: the generator, in eval mode.
        captions: B texts; "" draws without a caption.
        guidance: 0 draws from the captioned model alone.
        top_k: for all scales, or one a scale (the last value counts for further scales); 0 means all codes.
        top_p: in (0, 1].
        seed: the same seed gives the same tokens. One for all, to which a caption adds its place in the list, or one a caption.

    Raises:
        ValueError: top_p, top_k or guidance is out of range.
    """
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"sample_tokens: top_p: wanted a number in (0, 1], got {top_p}")
    if guidance < 0.0:
        raise ValueError(f"sample_tokens: guidance: wanted a number >= 0, got {guidance}")
    levels = len(model.config.scales)
    kept = [top_k] * levels if isinstance(top_k, int) else [*top_k, *[top_k[-1]] * levels][:levels]
    if min(kept) < 0:
        raise ValueError(f"sample_tokens: top_k: wanted 0 for all codes or a count, got {min(kept)}")
    count, device = len(captions), model.place.device
    if count == 0:
        return torch.empty(0, sum(model.lengths), dtype=torch.int64, device=device)
    maps, doubt = model.draft(*model.vocabulary.sets(captions))
    texts = list(captions)
    if guidance:
        null_maps, null_doubt = model.draft.null(count)
        maps, doubt, texts = torch.cat([maps, null_maps]), torch.cat([doubt, null_doubt]), texts + [""] * count
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else seed
    streams = [torch.Generator(device=device).manual_seed(s) for s in seeds]
    ids = model.vocabulary.ids(texts).to(device)
    draft = model.rows(maps.to(device)).split(model.lengths, dim=1)
    session = model.start(ids, doubt.to(device))
    tokens = torch.empty(count, 0, dtype=torch.int64, device=device)
    for scale, length in enumerate(model.lengths):
        inputs = model.inputs(tokens)[:, -length:]
        logits = model.step(session, scale, inputs.repeat(len(texts) // count, 1, 1), draft[scale])
        if guidance:
            t = guidance * scale / max(1, levels - 1)
            logits = (1 + t) * logits[:count] - t * logits[count:]
        logits = limit(logits, top_k=kept[scale], top_p=top_p)
        drawn = torch.stack([draw(row, stream) for row, stream in zip(logits, streams, strict=True)])
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


@torch.inference_mode()
def generate(
    model: Generator,
    tokenizer,
    captions: Sequence[str],
    *,
    guidance: float = GUIDANCE,
    top_k: int | Sequence[int] = TOP_K,
    top_p: float = TOP_P,
    seed: int = 0,
    batch: int = 32,
) -> Tensor:
    """Images for captions: float32 [B, 3, H, W] in [-1, 1]. Options as in `sample_tokens`.

    Words that no training caption holds count as unknown; `model.vocabulary.unknown(caption)` names them.

    Args:
        model: the generator.
        tokenizer: the `TokenFlow` whose tokens the generator was trained on.
        captions: texts.
        batch: captions sampled at once.
    """
    pictures = []
    for start in range(0, len(captions), batch):
        tokens = sample_tokens(
            model, captions[start : start + batch], guidance=guidance, top_k=top_k, top_p=top_p, seed=seed + start
        )
        pictures.append(tokenizer.decode(tokens).float().clamp(-1, 1))
    return torch.cat(pictures) if pictures else torch.empty(0, 3, 0, 0)
