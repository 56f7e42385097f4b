"""Training of the generator: cross-entropy of the tokenizer's tokens, by the clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenflow.data.pictures import Pictures
from tokenflow.generator.draft import Draft
from tokenflow.generator.model import Generator, GeneratorConfig
from tokenflow.generator.vocabulary import Vocabulary
from tokenflow.models.precision import autocast, fast_dtype
from tokenflow.training.run import Stage, WeightAverage


@dataclass(frozen=True)
class Recipe:
    """What the training does; equal for a checkpoint and the run that continues it.

    Attributes:
        left_out: share of the pictures that get the draft of a fit without them, so that the model learns what doubt means.
        no_caption: share of null captions, for guidance.
        noise: added to x as the blocks see it, standard deviation.
        last_share: share of the last scale's positions that a step computes.
    """

    batch: int = 16
    rate: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.03
    clip: float = 1.0
    average: float = 0.998
    left_out: float = 0.5
    no_caption: float = 0.1
    noise: float = 0.1
    last_share: float = 0.1875


class Trained:
    """The parameters of a module without its buffers, which the stage need not keep."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state, strict=False)


@torch.inference_mode()
def features_of(tokenizer: nn.Module, pictures: Pictures, *, batch: int = 64) -> Tensor:
    """The tokenizer's features before the quantizer, float32 [N, C, H, W].

    They are a smoother target for the draft than the accumulated codes, which carry the error of the search.
    """
    with autocast(pictures.images.device):
        return torch.cat(
            [
                tokenizer.encode_features(pictures.float_images(slice(i, i + batch))).float()
                for i in range(0, len(pictures), batch)
            ]
        )


def build(tokenizer: nn.Module, pictures: Pictures, maps: Tensor, **sizes: Any) -> tuple[Generator, Tensor, Tensor]:
    """A fresh generator for a tokenizer: vocabulary and draft are fitted to the pictures given, the rest is random.

    Args:
        tokenizer: a `TokenFlow`.
        pictures: N training pictures.
        maps: what the draft predicts, [N, C, H, W].
        **sizes: fields of `GeneratorConfig` to change.

    Returns:
        The generator; coordinates [N, R] and doubts [N] of the left-out drafts.
    """
    codebooks = tokenizer.quantizer.codebooks()
    config = GeneratorConfig(
        scales=tuple(tokenizer.config.scales),
        dims=tuple(c.shape[1] for c in codebooks),
        weights=(1.0, tokenizer.config.pixel_weight)[: len(codebooks)],
        codes=codebooks[0].shape[0],
        **sizes,
    )
    vocabulary = Vocabulary.fit(pictures.captions, pictures.bases)
    draft, left_out, doubt = Draft.fit(
        *vocabulary.sets(pictures.captions),
        maps,
        count=len(vocabulary.words),
        rank=config.rank,
        strength=config.strength,
    )
    return Generator(config, vocabulary, codebooks, draft), left_out, doubt


def train_generator(
    tokenizer: nn.Module,
    pictures: Pictures,
    indices: Tensor,
    maps: Tensor,
    run_dir: Path,
    seconds: float = 0.0,
    seed: int = 0,
    *,
    steps: int | None = None,
    recipe: Recipe = Recipe(),
    key: str = "",
    **sizes: Any,
) -> tuple[Generator, Stage]:
    """Train on the pictures of split "train", going on from `run_dir / "generator.ckpt"` if it is there.

    Args:
        tokenizer: the trained `TokenFlow`.
        pictures: N pictures; only those of split "train" are looked at, vocabulary and draft included.
        indices: their tokens, int64 [N, L].
        maps: what the draft learns, [N, C, H, W]: best the features before the quantizer, see `features_of`.
        run_dir: where the checkpoint lies.
        seconds: training time, summed over restarts.
        seed: of the weights and all random choices.
        steps: number of steps instead of a time: the same seed then gives the same weights.
        recipe: rates and shares.
        key: names tokens and pictures; a checkpoint of others is refused.
        **sizes: fields of `GeneratorConfig` to change.

    Returns:
        The generator with averaged weights in eval mode, and the stage with its history.

    Raises:
        ValueError: no picture is in split "train", or the checkpoint belongs to other settings.
    """
    rows = pictures.rows("train")
    if not len(rows):
        raise ValueError('train_generator: pictures: wanted some in split "train", got none')
    pictures, indices = pictures.take(rows), indices[rows]
    torch.manual_seed(seed)
    model, left_out, left_doubt = build(tokenizer, pictures, maps[rows], **sizes)
    fitted, fitted_doubt = model.draft.fitted(*model.vocabulary.sets(pictures.captions))
    drafts, doubts = torch.stack([fitted, left_out]), torch.stack([fitted_doubt, left_doubt])
    ids, null = model.vocabulary.ids(pictures.captions), model.vocabulary.ids([""])
    often = Counter(pictures.bases)
    chance = torch.tensor([often[b] ** -0.5 for b in pictures.bases])
    weights = token_weights(model)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "place" not in n and "words" not in n]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    average = WeightAverage(model, decay=recipe.average)
    settings = {**asdict(recipe), **asdict(model.config), "key": key}
    stage = Stage(
        "generator",
        run_dir,
        seconds=seconds,
        steps=steps,
        seed=seed,
        settings=settings,
        parts={"model": Trained(model), "optimizer": optimizer, "average": average},
        dtype=fast_dtype(pictures.images.device),
    )
    early, late = len(model.level) - model.lengths[-1], model.lengths[-1]
    model.train()
    for step in stage:
        stage.set_rate(optimizer, recipe.rate, warmup=recipe.warmup)
        picked = torch.multinomial(chance, recipe.batch, replacement=True)
        which = (torch.rand(recipe.batch) < recipe.left_out).long()
        uncaptioned = torch.rand(recipe.batch) < recipe.no_caption
        text = torch.where(uncaptioned[:, None], null, ids[picked])
        doubt = doubts[which, picked].masked_fill(uncaptioned, 1.0)
        draft = model.rows(model.draft.maps(drafts[which, picked].masked_fill(uncaptioned[:, None], 0.0)))
        inputs = model.inputs(indices[picked])
        last = early + torch.rand(recipe.batch, late).argsort(1)[:, : max(1, round(recipe.last_share * late))]
        with autocast(inputs.device):
            loss, losses = model.loss(
                text, inputs, draft, doubt, indices[picked], weights, last=last, noise=recipe.noise
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        average.update()
        if step % 10 == 0:
            stage.log(**{"cross-entropy": losses.mean()})
    model.load_state_dict({**model.state_dict(), **average.average})
    return model.eval(), stage


def token_weights(model: Generator) -> Tensor:
    """Weight of each of the L tokens in the loss: 8, 4, 2, 1, 1 for the scales 1, 2, 4, 8, 16."""
    sides = torch.tensor(model.config.scales)[model.level]
    return (sides[-1] / (2 * sides)).clamp(min=1.0)
