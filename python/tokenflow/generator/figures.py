"""What the page shows of the generator: pictures beside the draft and the real ones, and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow.data.pictures import Pictures
from tokenflow.generator.model import Generator
from tokenflow.generator.sample import GUIDANCE, TOP_K, TOP_P, generate
from tokenflow.models.precision import autocast

TYPED = (
    "blue apple",
    "smiling cat",
    "red heart",
    "orange cat face",
    "yellow car",
    "black cat",
    "green dog face",
    "purple dragonfruit",
)
NEAREST_SIDE = 16


def evenly(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows [n], evenly spaced."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count).long()]


def psnr(images: Tensor, real: Tensor) -> float:
    """Mean over pictures of 10 log10(4 / mse) in dB, images [n, 3, H, W] in [-1, 1]; nan without pictures."""
    return float((-10 * ((images - real).square().flatten(1).mean(1).clamp(min=1e-9) / 4).log10()).mean())


def nearest(images: Tensor, pictures: Pictures) -> list[int]:
    """For each image [n, 3, H, W] in [-1, 1] the picture that is nearest at 16 x 16 pixels, in the sum of squares."""
    small = lambda x: F.adaptive_avg_pool2d(x, NEAREST_SIDE).flatten(1)  # noqa: E731
    known = torch.cat([small(pictures.images[i : i + 512].float() / 127.5 - 1) for i in range(0, len(pictures), 512)])
    return torch.cdist(small(images), known).argmin(1).tolist()


def judge(images: Tensor, rows: Tensor, pictures: Pictures) -> dict[str, float]:
    """PSNR to the pictures at `rows`, and how often the nearest of all pictures has the right base and the right tone."""
    found = nearest(images, pictures)
    right = lambda names: sum(names[f] == names[int(r)] for f, r in zip(found, rows, strict=True)) / max(1, len(rows))  # noqa: E731
    return {
        "psnr": psnr(images, pictures.float_images(rows)),
        "base": right(pictures.bases),
        "tone": right(pictures.tones),
    }


@torch.inference_mode()
def cross_entropy(model: Generator, captions: Sequence[str], indices: Tensor, batch: int = 32) -> list[float]:
    """Mean cross-entropy of the tokens [n, L] at each scale, in nats, each scale given the true ones before it."""
    total = torch.zeros(len(model.lengths))
    for start in range(0, len(captions), batch):
        texts, tokens = captions[start : start + batch], indices[start : start + batch]
        maps, doubt = model.draft(*model.vocabulary.sets(texts))
        with autocast(tokens.device):
            logits = model(model.vocabulary.ids(texts), model.inputs(tokens), model.rows(maps), doubt)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        total += torch.stack([part.mean(1).sum() for part in losses.split(model.lengths, dim=1)])
    return (total / max(1, len(captions))).tolist()


@torch.inference_mode()
def drafted(model: Generator, tokenizer: nn.Module, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The drafts decoded alone, [n, 3, H, W] in [-1, 1], and their doubts [n]."""
    maps, doubt = model.draft(*model.vocabulary.sets(captions))
    return torch.cat([tokenizer.decode_features(m).float().clamp(-1, 1) for m in maps.split(32)]), doubt


def byte_images(images: Tensor) -> Tensor:
    """[n, 3, H, W] in [-1, 1] -> uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def figures(
    model: Generator,
    tokenizer: nn.Module,
    pictures: Pictures,
    indices: Tensor,
    *,
    typed: Sequence[str] = TYPED,
    columns: int = 8,
    measured: int = 48,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows of pictures and a table of numbers.

    Args:
        model: the trained generator.
        tokenizer: the `TokenFlow` it writes tokens of.
        pictures: all N pictures, with their split.
        indices: their tokens, int64 [N, L].
        typed: captions that no picture has; one that a picture has is left out.
        columns: pictures in a row.
        measured: most pictures of one kind in the numbers.
        seed: of the sampling.

    Returns:
        rows: a list of {title, note, items}; an item is {caption, mark, unknown, doubt, draft, generated, real}: `mark` says "seen",
            "unseen pair", "unseen name" or "typed"; `unknown` lists the words that were never seen; `doubt` is the draft's, in
            [0, 1]; draft, generated and real are uint8 [3, H, W], real None where there is no such picture.
        numbers: for "seen", "unseen pair" and "unseen name", where there are such pictures: {count, cross_entropy (a number a
            scale), and for "draft", "generator" and "tokenizer" (the true tokens decoded): {psnr, base, tone}}.
        sampling: {guidance, top_k, top_p, seed}.
    """
    kinds = {
        "seen": torch.tensor([r for r in pictures.rows("train").tolist() if not pictures.tones[r]], dtype=torch.int64),
        "unseen pair": pictures.rows("pair"),
        "unseen name": pictures.rows("test"),
    }
    notes = {
        "seen": ("Captions it was trained on", "The model returns what it has learned by heart."),
        "unseen pair": (
            "Unseen pairs of a thing and a tone",
            "Both were trained on, never together. The real picture was hidden.",
        ),
        "unseen name": ("Unseen names", "No picture of this name was trained on. The real picture was hidden."),
    }
    rows, numbers = [], {}
    for kind, (title, note) in notes.items():
        chosen = evenly(kinds[kind], measured)
        if not len(chosen):
            continue
        captions = [pictures.captions[int(r)] for r in chosen]
        (drafts, doubts), images = drafted(model, tokenizer, captions), generate(model, tokenizer, captions, seed=seed)
        decoded = torch.cat([tokenizer.decode(part) for part in indices[chosen].split(32)]).float().clamp(-1, 1)
        numbers[kind] = {
            "count": len(chosen),
            "cross_entropy": cross_entropy(model, captions, indices[chosen]),
            "draft": judge(drafts, chosen, pictures),
            "generator": judge(images, chosen, pictures),
            "tokenizer": judge(decoded, chosen, pictures),
        }
        shown = evenly(torch.arange(len(chosen)), columns).tolist()
        rows.append(
            {
                "title": title,
                "note": note,
                "items": items(
                    model,
                    [captions[i] for i in shown],
                    kind,
                    doubts[shown],
                    drafts[shown],
                    images[shown],
                    pictures.images[chosen[shown]],
                ),
            }
        )
    known = set(pictures.captions)
    texts = [t for t in typed if t not in known][:columns]
    if texts:
        drafts, doubts = drafted(model, tokenizer, texts)
        rows.append(
            {
                "title": "Typed captions",
                "note": "No such picture exists in the data.",
                "items": items(
                    model, texts, "typed", doubts, drafts, generate(model, tokenizer, texts, seed=seed), None
                ),
            }
        )
    return {
        "rows": rows,
        "numbers": numbers,
        "sampling": {"guidance": GUIDANCE, "top_k": list(TOP_K), "top_p": TOP_P, "seed": seed},
    }


def items(
    model: Generator,
    captions: Sequence[str],
    mark: str,
    doubts: Tensor,
    drafts: Tensor,
    images: Tensor,
    real: Tensor | None,
) -> list[dict[str, Any]]:
    """One entry a caption, as `figures` describes them."""
    drafts, images = byte_images(drafts), byte_images(images)
    return [
        {
            "caption": c,
            "mark": mark,
            "unknown": model.vocabulary.unknown(c),
            "doubt": float(doubts[i]),
            "draft": drafts[i],
            "generated": images[i],
            "real": None if real is None else real[i],
        }
        for i, c in enumerate(captions)
    ]
