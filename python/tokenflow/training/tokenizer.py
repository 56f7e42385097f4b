"""Training of the tokenizer: reconstruction, distillation, commitment, and in the second half a perceptual distance.

    L = |x' - x| + (x' - x)^2 + w_sem (1 - cos(semantic decoder, teacher)) + commitment + w_per ST-LPIPS(x', x)

Source: section 3 of the TokenFlow paper without the adversarial term; the codebooks follow by EMA instead of a gradient.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.losses.st_lpips import STLPIPS
from tokenflow.models.precision import autocast, fast_dtype
from tokenflow.models.tokenflow import TokenFlow
from tokenflow.training.muon import Muon, matrices
from tokenflow.training.run import Stage, WeightAverage, batch_rows


@dataclass(frozen=True)
class Recipe:
    """What the training does; equal for a checkpoint and the run that continues it.

    Muon moves the weights of linear layers and convolutions at `matrix_rate`, AdamW the rest at `rate`.
    """

    batch: int = 16
    rate: float = 1.5e-3
    matrix_rate: float = 4e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.998
    semantic_weight: float = 0.5
    perceptual_weight: float = 0.2
    perceptual_pictures: int = 4
    perceptual_from: float = 0.5
    revival_until: float = 0.8


def train_tokenizer(
    model: TokenFlow,
    images: Tensor,
    targets: Tensor,
    run_dir: Path,
    *,
    seconds: float = 0.0,
    steps: int | None = None,
    seed: int = 0,
    recipe: Recipe = Recipe(),
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
        recipe: rates and weights.
        key: names the pictures; a checkpoint of other pictures is refused.

    Returns:
        The model with averaged weights in eval mode, and the stage with its history.

    Raises:
        ValueError: the checkpoint belongs to other settings.
    """
    model = model.to(memory_format=torch.channels_last)
    average = WeightAverage(model, decay=recipe.average)
    weights = matrices(model)
    others = [p for p in model.parameters() if all(p is not w for w in weights)]
    muon = Muon(weights, recipe.matrix_rate, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(others, recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True)
    stage = Stage(
        "tokenizer",
        run_dir,
        seconds=seconds,
        steps=steps,
        seed=seed,
        settings={**asdict(recipe), "pictures": key},
        parts={"model": model, "muon": muon, "optimizer": adam, "average": average},
        dtype=fast_dtype(images.device),
    )
    perceptual = STLPIPS.installed()
    model.train()
    for step in stage:
        rows = batch_rows(step, len(images), recipe.batch, seed)
        x, target = flipped(images[rows].float().div_(127.5).sub_(1.0), targets[rows])
        if stage.progress > recipe.revival_until:
            model.quantizer.quantizer.codebook.dead_code_threshold = 0.0
        stage.set_rate(muon, recipe.matrix_rate, warmup=recipe.warmup)
        stage.set_rate(adam, recipe.rate, warmup=recipe.warmup)
        with autocast(images.device):
            out = model(x)
            difference = out.images.float() - x
            mse = difference.square().mean()
            semantic = 1 - F.cosine_similarity(out.semantic.float(), target, dim=1).mean()
            loss = difference.abs().mean() + mse + recipe.semantic_weight * semantic + out.loss
            if perceptual is not None and stage.progress >= recipe.perceptual_from:
                few = slice(0, recipe.perceptual_pictures)
                distance = perceptual(out.images[few], x[few]).mean()
                loss = loss + recipe.perceptual_weight * distance
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        muon.step()
        adam.step()
        average.update()
        if step % 10 == 0:
            stage.log(
                PSNR=float(-10 * (mse.detach() / 4).log10()), semantic=semantic.detach(), commitment=out.loss.detach()
            )
            if perceptual is not None and stage.progress >= recipe.perceptual_from:
                stage.log(**{"ST-LPIPS": distance.detach()})
    model.load_state_dict({**model.state_dict(), **average.average})
    return model.eval(), stage


def flipped(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture mirrored with probability one half, its target grid with it: [B, 3, H, W] and [B, D, h, w]."""
    mirror = (torch.rand(len(images)) < 0.5).view(-1, 1, 1, 1)
    return torch.where(mirror, images.flip(3), images), torch.where(mirror, targets.flip(3), targets)
