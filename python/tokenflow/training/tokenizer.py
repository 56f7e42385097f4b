"""Training of the demo's tokenizer: `tokenflow train tokenflow-tiny`'s recipe on pictures in memory, by the clock.

    L = |x' - x| + (x' - x)^2 + w_sem (1 - cos(semantic decoder, teacher)) + commitment + w_per ST-LPIPS(x', x)

The teacher's features are computed once, and a run lasts a number of seconds rather than of steps. What the recipe counts in
steps of its whole run, such as the start of the last term, comes at the same share of the time.

Source: section 3 of the TokenFlow paper without the adversarial term; the codebooks follow by EMA instead of a gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tokenflow.losses.st_lpips import STLPIPS
from tokenflow.models.precision import autocast, fast_dtype
from tokenflow.models.tokenflow import TokenFlow
from tokenflow.training import parts
from tokenflow.training.config import Config, identity
from tokenflow.training.recipes import TINY
from tokenflow.training.run import Stage, WeightAverage, batch_rows

LOGGED = {"semantic": "semantic", "quantizer": "commitment", "perceptual": "ST-LPIPS"}
"""What the page calls the objective's terms."""


def train_tokenizer(
    model: TokenFlow,
    images: Tensor,
    targets: Tensor,
    run_dir: Path,
    *,
    seconds: float = 0.0,
    steps: int | None = None,
    seed: int = 0,
    recipe: Config = TINY,
    key: str = "",
) -> tuple[TokenFlow, Stage]:
    """Train on `images` for a time or a number of steps, going on from `run_dir / "tokenizer.ckpt"` if it is there.

    Args:
        model: a fresh model; its parameters are trained in place.
        images: uint8 [N, 3, H, W], training pictures only.
        targets: float32 [N, teacher_dim, h, w], the teacher's grid of the same pictures.
        run_dir: where the checkpoint lies.
        seconds: training time, summed over restarts.
        steps: number of steps instead of a time: the same seed then gives the same weights.
        seed: of the initial weights, the batches and the flips.
        recipe: losses and optimiser; rates follow a cosine. Where ST-LPIPS is not installed, its term is left out.
        key: names the pictures; a checkpoint of other pictures is refused.

    Returns:
        The model with averaged weights in eval mode, and the stage with its history.

    Raises:
        ValueError: the checkpoint belongs to other settings.
    """
    if STLPIPS.installed() is None:
        recipe = replace(recipe, loss=replace(recipe.loss, perceptual=0.0))
    o = recipe.optimizer
    model = model.to(memory_format=torch.channels_last)
    objective = parts.build_objective(recipe, model.image_size)
    average = WeightAverage(model, decay=o.average)
    optimizers = parts.build_optimizers(recipe, model)
    stage = Stage(
        "tokenizer",
        run_dir,
        seconds=seconds,
        steps=steps,
        seed=seed,
        settings={**identity(recipe), "pictures": key},
        parts={"model": model, "average": average, **optimizers},
        dtype=fast_dtype(images.device),
    )
    warmup = max(1, recipe.steps_of(o.warmup))
    model.train()
    for step in stage:
        at = int(stage.progress * o.steps)
        rows = batch_rows(step, len(images), o.batch, seed)
        x, target = flipped(images[rows].float().div_(127.5).sub_(1.0), targets[rows])
        if at >= recipe.steps_of(o.revive_until) > 0:
            model.quantizer.quantizer.codebook.dead_code_threshold = 0.0
        with autocast(images.device):
            out = model(x)
            loss = objective.generator(at, x, out.images, quantizer=out.loss, semantic=(out.semantic, target))
        model.zero_grad(set_to_none=True)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip or math.inf)
        for name, optimizer in optimizers.items():
            stage.set_rate(optimizer, parts.peak_rate(recipe, name), warmup=warmup, floor=o.floor)
            optimizer.step()
        average.update()
        if step % 10 == 0:
            stage.log(
                PSNR=-10 * math.log10(max(float(loss.terms["mse"]), 1e-12) / 4),
                **{LOGGED[name]: term for name, term in loss.terms.items() if name in LOGGED},
            )
    average.copy_to(model)
    return model.eval(), stage


def flipped(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture mirrored with probability one half, its target grid with it: [B, 3, H, W] and [B, D, h, w]."""
    mirror = (torch.rand(len(images)) < 0.5).view(-1, 1, 1, 1)
    return torch.where(mirror, images.flip(3), images), torch.where(mirror, targets.flip(3), targets)
