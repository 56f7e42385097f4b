"""The paper's ablation in small: what shared mapping and scales add to one distilled codebook.

    one distilled codebook   ->   + shared mapping   ->   + scales       (same pictures, seed, networks and training for each)

The rows are values of one `Config`. Every row leaves whole files under the output folder, so the same call after a stop goes on
where it was.

Source: table 5 of the TokenFlow paper.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenflow.data import Pictures, fluent_emoji, image_folder
from tokenflow.data.pictures import skipped_sentence
from tokenflow.demo import PRESET, cached, processor
from tokenflow.evaluation.distribution import kid
from tokenflow.evaluation.features import LiteFeatures
from tokenflow.evaluation.measure import rounded
from tokenflow.evaluation.probe import balanced_probe
from tokenflow.evaluation.reconstruction import code_use, perceptual, psnr
from tokenflow.evaluation.tokenizer import codes_of, decode_all, semantic_grid, teacher_cosine, tokens_of
from tokenflow.files import write_whole
from tokenflow.losses.st_lpips import STLPIPS
from tokenflow.models.tokenflow import PRESETS, TokenFlow
from tokenflow.report.ablation import ablation_page, table, verdict
from tokenflow.report.sections import chosen_rows
from tokenflow.teacher import teacher_features, teacher_targets
from tokenflow.training.run import Stage
from tokenflow.training.tokenizer import train_tokenizer

SHOWN = 12


@dataclass(frozen=True)
class Variant:
    """One row: its title, what it changes of the preset, and where it stands in the paper's table, rFID and MME-P."""

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    paper: tuple[float, float] | None = None


LAST = (PRESETS[PRESET].scales[-1],)
VARIANTS = {
    "distilled": Variant("one distilled codebook", {"pixel_dim": 0, "scales": LAST}, (8.07, 1252)),
    "shared": Variant("+ shared mapping", {"scales": LAST}, (3.96, 1213)),
    "multi-scale": Variant("+ multi-scale", {}, (2.18, 1210)),
}
FURTHER = {
    "unweighted": Variant("multi-scale, both halves weighted 1", {"pixel_weight": 1.0}),
    "start": Variant(
        "multi-scale, random start" if PRESETS[PRESET].kmeans_init else "multi-scale, k-means start",
        {"kmeans_init": not PRESETS[PRESET].kmeans_init},
    ),
}


@dataclass(frozen=True)
class Plan:
    """What the ablation is asked for.

    Attributes:
        data: a folder of images; None fetches Fluent Emoji 3D through npm.
        out: where everything is written.
        cache: where fetched packages lie.
        seconds: training time of each row.
        steps: training steps of each instead of the time: rows that differ in nothing but the variant.
        seed: of everything random.
        further: also the rows of FURTHER.
    """

    data: Path | None = None
    out: Path = Path("runs/ablation")
    cache: Path = Path(".cache/tokenflow")
    seconds: float = 240.0
    steps: int | None = None
    seed: int = 0
    further: bool = False


@dataclass
class Row:
    """A variant, what was measured of it, and reconstructions [n, 3, H, W] in 8 bits of the pictures that the page shows."""

    variant: Variant
    numbers: dict[str, Any]
    shown: Tensor


@dataclass
class Results:
    """Everything that the page shows."""

    plan: Plan
    pictures: Pictures
    chosen: list[int]
    rows: dict[str, Row]


def run_ablation(plan: Plan) -> Path:
    """Run or continue the ablation; returns the page's path.

    Raises:
        Missing: npm or the teacher is missing.
        FileNotFoundError: the folder of images is missing.
        ValueError: the folder holds too few pictures, or the output folder belongs to another run.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    pictures = fluent_emoji(plan.cache) if plan.data is None else image_folder(plan.data, without=plan.out)
    variants = VARIANTS | (FURTHER if plan.further else {})
    print(
        f"{len(variants)} tokenizers, {len(pictures.rows('train', 'pair'))} pictures to train each on, "
        f"{len(pictures.rows('test'))} held out; everything goes to {plan.out}",
        flush=True,
    )
    key = pictures.fingerprint()
    features = cached(plan.out / "teacher.pt", key, lambda: teacher_features(pictures.images))
    targets, _ = teacher_targets(features, pictures.rows("train", "pair"))
    originals = pictures.images[pictures.rows("test")]
    reference = cached(plan.out / "reference.pt", key, lambda: kernel_features(originals))
    chosen = chosen_rows(pictures, SHOWN)
    rows = {}
    for number, (name, variant) in enumerate(variants.items(), 1):
        print(f"{number} of {len(variants)}: {variant.title}", flush=True)
        rows[name] = made(variant, plan, plan.out / name, pictures, targets, reference, chosen, key)
    results = Results(plan, pictures, chosen, rows)
    write_whole(plan.out / "ablation.json", json.dumps(as_json(results), indent=2) + "\n")
    page = plan.out / "index.html"
    write_whole(page, ablation_page(results))
    print(table(rows))
    print("\n".join(verdict(rows)))
    if pictures.skipped:
        print(skipped_sentence(pictures.skipped))
    print(f"open {page}")
    return page


def kernel_features(images: Tensor, *, batch: int = 64) -> Tensor:
    """What the kernel distance compares, [n, D], of uint8 images [n, 3, H, W]."""
    features = LiteFeatures((images.shape[2], images.shape[3]))
    return torch.cat([features(chunk) for chunk in images.split(batch)])


def made(
    variant: Variant,
    plan: Plan,
    out: Path,
    pictures: Pictures,
    targets: Tensor,
    reference: Tensor,
    chosen: list[int],
    key: str,
) -> Row:
    """Train a variant, or go on, save it under `out`, and measure it once."""
    out.mkdir(parents=True, exist_ok=True)
    train = pictures.rows("train", "pair")
    torch.manual_seed(plan.seed)
    model = TokenFlow(replace(PRESETS[PRESET], **variant.changes))
    model, stage = train_tokenizer(
        model, pictures.images[train], targets[train], out,
        seconds=plan.seconds, steps=plan.steps, seed=plan.seed, key=key,
    )  # fmt: skip
    model.save_pretrained(out / "tokenizer")
    key = f"{key}-{plan.seed}-{stage.step}-{stage.elapsed:.3f}"
    found = cached(out / "measured.pt", key, lambda: measured(model, stage, pictures, targets, reference, chosen))
    return Row(variant, found["numbers"], found["shown"])


def measured(
    model: TokenFlow, stage: Stage, pictures: Pictures, targets: Tensor, reference: Tensor, chosen: list[int]
) -> dict[str, Any]:
    """What is known of a trained variant.

    Args:
        model: the tokenizer in eval mode.
        stage: its finished training.
        pictures: N pictures with their split.
        targets: [N, teacher_dim, h, w], the teacher's grid.
        reference: `kernel_features` of the held-out pictures.
        chosen: positions of the pictures that the page shows.

    Returns:
        "numbers" by name, of held-out pictures where nothing else is said, None where one cannot be had, and "shown", the
        reconstructions of the chosen pictures in 8 bits.
    """
    train, test = pictures.rows("train", "pair"), pictures.rows("test")
    indices = tokens_of(model, pictures)
    codes = codes_of(model, indices)
    decoded, originals = decode_all(model, indices[test]), pictures.float_images(test)
    metric = STLPIPS.installed()
    groups = [[pictures.groups[r] for r in rows] for rows in (train, test)]
    grid = semantic_grid(model, codes)
    probe = balanced_probe(grid[train], groups[0], grid[test], groups[1])
    _, use, perplexity = code_use(indices, model.config.codebook_size)
    numbers = {
        "PSNR": float(psnr(decoded, originals).mean()),
        "ST-LPIPS": None if metric is None else perceptual(metric, decoded, originals),
        "KID": kid(reference, kernel_features(rounded(decoded)))[0] if len(test) > 1 else None,
        "probe": None if probe is None else probe.balanced,
        "teacher cosine": teacher_cosine(model, codes[test], targets[test]),
        "tokens": indices.shape[1],
        "codes used": use,
        "perplexity": perplexity,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": stage.step,
        "seconds": stage.elapsed,
    }
    return {"numbers": numbers, "shown": rounded(decode_all(model, indices[chosen]))}


def as_json(results: Results) -> dict[str, Any]:
    """ablation.json: the numbers, what the rows change, the verdict, and the conditions."""
    plan = results.plan
    return {
        "rows": {
            name: {
                "title": row.variant.title,
                "changes": dict(row.variant.changes),
                "paper": None if row.variant.paper is None else dict(zip(("rFID", "MME-P"), row.variant.paper)),
                **row.numbers,
            }
            for name, row in results.rows.items()
        },
        "verdict": verdict(results.rows),
        "conditions": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seed": plan.seed,
            "config": asdict(PRESETS[PRESET]),
            "held out": len(results.pictures.rows("test")),
        },
        "skipped": results.pictures.skipped,
    }
