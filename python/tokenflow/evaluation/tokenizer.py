"""Every number of the tokenizer in one table, measured on base names that it was never trained on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tokenflow.data.pictures import Pictures, stable_order
from tokenflow.evaluation.probe import Probe, balanced_probe
from tokenflow.evaluation.reconstruction import code_use, perceptual, psnr
from tokenflow.evaluation.retrieval import Ranks, TextRegression, ranks_of_diagonal
from tokenflow.evaluation.text import text_vectors
from tokenflow.losses.st_lpips import STLPIPS
from tokenflow.models.tokenflow import TokenFlow

GRID = 8
TRAINED_SAMPLE = 400


@torch.inference_mode()
def tokens_of(model: TokenFlow, pictures: Pictures, *, batch: int = 64) -> Tensor:
    """Token ids [N, L] of all pictures, in float32 arithmetic."""
    chunks = torch.arange(len(pictures)).split(batch)
    return torch.cat([model.encode(pictures.float_images(rows)) for rows in tqdm(chunks, desc="tokens", unit="batch")])


@torch.inference_mode()
def codes_of(model: TokenFlow, indices: Tensor, *, batch: int = 64) -> Tensor:
    """Accumulated codes [N, C, H, W] of ids [N, L]."""
    return torch.cat([model.quantizer.decode(chunk) for chunk in indices.split(batch)]).float()


@torch.inference_mode()
def decode_all(model: TokenFlow, indices: Tensor, *, batch: int = 64) -> Tensor:
    """Images [N, 3, H, W] from ids [N, L] of whole scales, in chunks."""
    return torch.cat([model.decode(chunk) for chunk in indices.split(batch)])


def prefixes(model: TokenFlow, indices: Tensor) -> list[Tensor]:
    """Images after 1, 2, ... scales of ids [N, L]: a list of [N, 3, H, W]."""
    ends = torch.tensor([s * s for s in model.config.scales]).cumsum(0).tolist()
    return [decode_all(model, indices[:, :end]) for end in ends]


@torch.inference_mode()
def teacher_cosine(model: TokenFlow, f_hat: Tensor, targets: Tensor, *, batch: int = 64) -> float:
    """Mean cosine of what the semantic decoder makes of codes [N, C, H, W] and the teacher's grid [N, D, h, w]."""
    said = torch.cat([model.decode_semantic(chunk) for chunk in f_hat.split(batch)])
    return float(F.cosine_similarity(said, targets, dim=1).mean())


def semantic_grid(model: TokenFlow, f_hat: Tensor, side: int = GRID) -> Tensor:
    """The semantic half averaged to `side` x `side`, one row a picture: [N, semantic_dim * side^2]."""
    return F.adaptive_avg_pool2d(f_hat[:, : model.config.semantic_dim], side).flatten(1)


def pixel_grid(pictures: Pictures, side: int | None = None) -> Tensor:
    """Raw pixels in [-1, 1], averaged to `side` x `side` unless None, one row a picture."""
    images = pictures.float_images()
    return (images if side is None else F.adaptive_avg_pool2d(images, side)).flatten(1)


def evaluate(model: TokenFlow, pictures: Pictures, indices: Tensor, f_hat: Tensor, targets: Tensor) -> dict[str, Any]:
    """The numbers by name, None where one cannot be measured (no groups, ST-LPIPS not installed); under "found" what the page
    shows of the retrieval: rows [n] of the candidates and scores [n, n] (picture, caption).

    Args:
        model: the tokenizer in eval mode.
        pictures: N pictures with their split.
        indices: [N, L] token ids.
        f_hat: [N, C, H, W] accumulated codes.
        targets: [N, teacher_dim, 8, 8] the teacher's grid.
    """
    train, test = pictures.rows("train", "pair"), pictures.rows("test")
    originals = pictures.float_images(test)
    by_prefix = [float(psnr(images, originals).mean()) for images in prefixes(model, indices[test])]
    some = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:TRAINED_SAMPLE]]
    metric = STLPIPS.installed()
    ranked, rows, scores = retrieval(model, pictures, f_hat)
    decoded = decode_all(model, indices[test])
    _, use, perplexity = code_use(indices, model.config.codebook_size)
    by_scale = [code_use(part, model.config.codebook_size)[2] for part in model.quantizer.split(indices)]
    return {
        "pictures": {
            "training": len(train),
            "held out": len(test),
            "held-out bases": len({pictures.bases[r] for r in test}),
        },
        "psnr": by_prefix[-1],
        "psnr of training pictures": float(psnr(decode_all(model, indices[some]), pictures.float_images(some)).mean()),
        "psnr of prefixes": by_prefix,
        "st-lpips": None if metric is None else perceptual(metric, decoded, originals),
        "codebook use": use,
        "perplexity": perplexity,
        "perplexity by scale": by_scale,
        "teacher cosine": teacher_cosine(model, f_hat[test], targets[test]),
        "teacher cosine of training pictures": teacher_cosine(model, f_hat[some], targets[some]),
        "probe": probes(model, pictures, f_hat, train, test),
        "retrieval": ranked,
        "found": {"rows": rows, "scores": scores},
    }


def probes(model: TokenFlow, pictures: Pictures, f_hat: Tensor, train: Tensor, test: Tensor) -> dict[str, Any] | None:
    """Balanced accuracy of the class probe on several kinds of features; None without two classes."""
    groups = [[pictures.groups[r] for r in rows] for rows in (train, test)]
    kinds = {
        f"semantic half, {GRID} x {GRID}": semantic_grid(model, f_hat),
        "semantic half, mean": semantic_grid(model, f_hat, 1),
        f"pixels, {GRID} x {GRID}": pixel_grid(pictures, GRID),
        "raw pixels": pixel_grid(pictures),
    }
    results: dict[str, Probe | None] = {
        name: balanced_probe(x[train], groups[0], x[test], groups[1]) for name, x in kinds.items()
    }
    first = next(iter(results.values()))
    if first is None:
        return None
    return {
        "classes": first.classes,
        "smallest class": first.smallest,
        **{name: p.balanced for name, p in results.items()},
    }


def retrieval(model: TokenFlow, pictures: Pictures, f_hat: Tensor) -> tuple[dict[str, Any], list[int], Tensor]:
    """Ranks of held-out captions and pictures, one picture a base; the rows of those pictures, and scores [n, n] (picture, caption)."""
    train = pictures.rows("train", "pair")
    bases = [pictures.bases[r] for r in train]
    chosen = pictures.one_per_base("test")
    rows = [chosen[base] for base in stable_order(list(chosen))]
    vectors, method = text_vectors(pictures.captions)
    result: dict[str, Any] = {"text": method, "candidates": len(rows)}
    kinds = {
        f"semantic half, {GRID} x {GRID}": semantic_grid(model, f_hat),
        f"pixels, {GRID} x {GRID}": pixel_grid(pictures, GRID),
    }
    scores = []
    for name, x in kinds.items():
        regression = TextRegression(x[train], vectors[train], bases)
        scores.append(regression.scores(x[rows], vectors[rows]))
        for way, table in (("picture to caption", scores[-1]), ("caption to picture", scores[-1].T)):
            result[f"{name}, {way}"] = vars(Ranks.of(ranks_of_diagonal(table), len(rows)))
    result["chance"] = vars(Ranks.chance(len(rows)))
    return result, rows, scores[0]
