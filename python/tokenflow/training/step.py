"""One step of training: the tokenizer's passes, its update, the discriminator's passes, its update.

Everything random in a step is drawn from a generator that seed, step, pass and rank decide, so that nothing of it has to be
saved.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokenflow.data.loading import as_float
from tokenflow.losses import Objective, clamp_logit_scale_
from tokenflow.models import TokenFlow, Tokenizer, UniTok
from tokenflow.training import parts, sharding
from tokenflow.training.config import Config
from tokenflow.training.pictures import Batch


class Told(NamedTuple):
    """terms: by name, 0-dim, means over the passes of this rank; finite: whether the weights moved."""

    terms: dict[str, Tensor]
    finite: bool


class Step:
    """The networks and optimisers of a run.

    Args:
        config: of the run.
        accelerator: of the run.
        model: the tokenizer, on the CPU.
        objective: its losses.
        judge: the discriminator, None for none.
        teacher: of the semantic decoder, None for none.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: Tokenizer,
        objective: Objective,
        judge: nn.Module | None,
        teacher: nn.Module | None,
    ) -> None:
        self.config, self.accelerator, self.bare, self.bare_judge = config, accelerator, model, judge
        device = accelerator.device
        model.to(device)
        for parameter in model.parameters():
            # Module.to would try stacked convolutions, too; FSDP2 takes none of them.
            if parameter.dim() == 4 and not config.optimizer.shard:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.objective = objective.to(device).train()
        self.teacher = None if teacher is None else teacher.to(device)
        self.sharded = config.optimizer.shard
        if self.sharded:
            self.portrait = sharding.Portrait(model, accelerator.is_main_process)
            sharding.shard(model, parts.last_layer(model), device)
        optimizers = parts.build_optimizers(config, model)
        # Newer releases of torch have another name for what DDP shall not do with buffers, and mean more by it.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        if self.sharded:
            self.model = model
            self.optimizers = {name: accelerator.prepare_optimizer(o) for name, o in optimizers.items()}
        else:
            self.model, *prepared = accelerator.prepare(model, *optimizers.values())
            self.optimizers = dict(zip(optimizers, prepared, strict=True))
        self.judge = self.judge_optimizer = None
        if judge is not None:
            judge.to(device)
            self.judge, self.judge_optimizer = accelerator.prepare(
                judge, parts.build_discriminator_optimizer(config, judge)
            )
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.codebooks = [m for m in model.modules() if getattr(m, "dead_code_threshold", 0) > 0]
        parts.training_mode(model, config)

    def rate(self, step: int) -> float:
        """The learning rates' factor at a step."""
        o, warmup = self.config.optimizer, self.config.steps_of(self.config.optimizer.warmup)
        rising = min(1.0, (step + 1) / max(1, warmup))
        if o.schedule == "constant":
            return rising
        progress = min(1.0, max(0, step - warmup) / max(1, o.steps - warmup))
        return rising * (o.floor + (1 - o.floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    def __call__(self, step: int, batches: Sequence[Batch]) -> Told:
        """Train on the passes of one step."""
        self._schedule(step)
        seen: list[tuple[Tensor, Tensor]] = []
        told: list[dict[str, Tensor]] = []
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for part, batch in enumerate(batches):
            self._draw(step, part)
            with self._synchronised(self.model, part, len(batches)):
                terms, images, decoded = self._forward(step, batch, len(batches))
            told.append(terms)
            if self.judge is not None and self.objective.adversarial_weight(step):
                seen.append((images, decoded.detach()))
        norm, finite = self._update(list(self.optimizers.values()), self.trained, self.config.optimizer.clip)
        if isinstance(self.bare, UniTok):
            clamp_logit_scale_(self.bare.logit_scale)
        terms = {**_means(told), "gradient_norm": norm}
        if seen and finite:
            terms |= self._discriminate(step, seen)
        return Told(terms, finite)

    def _forward(self, step: int, batch: Batch, passes: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Forward and backward of one pass: its terms, the images that were decoded, and their reconstructions."""
        device, model = self.accelerator.device, self.bare
        images = as_float(batch.images.to(device, non_blocking=True))
        given: dict[str, object] = {}
        with self.accelerator.autocast():
            if isinstance(model, UniTok):
                words = (
                    None if batch.words is None or not self.objective.weights.contrastive else batch.words.to(device)
                )
                count = max(1, round(self.config.loss.reconstructed * len(images)))
                out = self.model(images, words, reconstructed=count)
                if words is not None:
                    given["contrastive"] = (
                        out.image_vectors[batch.captioned.to(device)],
                        out.text_vectors,
                        out.logit_scale,
                    )
                images = images[:count]
            else:
                out = self.model(images)
                if isinstance(model, TokenFlow) and self.teacher is not None:
                    given["semantic"] = (out.semantic, self.teacher(images))
            judge = self.judge if self.objective.adversarial_weight(step) else None
            if judge is not None and self.objective.weights.adaptive is not None:
                given["last_layer"] = parts.last_layer(model)
            loss = self.objective.generator(step, images, out.images, quantizer=out.loss, discriminator=judge, **given)
        self.accelerator.backward(loss.total / passes)
        terms = {"loss": loss.total.detach(), **loss.terms}
        return terms, images, out.images

    def _discriminate(self, step: int, seen: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        told = []
        self.judge_optimizer.zero_grad(set_to_none=True)
        for part, (images, decoded) in enumerate(seen):
            self._draw(step, len(seen) + part)
            with self._synchronised(self.judge, part, len(seen)):
                with self.accelerator.autocast():
                    loss = self.objective.discriminator(step, images, decoded, self.judge)
                self.accelerator.backward(loss.total / len(seen))
            told.append(loss.terms)
        learned = [p for p in self.bare_judge.parameters() if p.requires_grad]
        norm, _ = self._update([self.judge_optimizer], learned, self.config.adversary.discriminator_clip)
        return {**_means(told), "discriminator_norm": norm}

    def _update(self, optimizers: list, trained: list[Tensor], clip: float) -> tuple[Tensor, bool]:
        """The gradient's norm, and whether the step was made: not where it is not finite, on no rank then."""
        self.accelerator.unscale_gradients(optimizers)
        clipping = sharding if self.sharded and trained is self.trained else nn.utils
        norm = clipping.clip_grad_norm_(trained, clip or math.inf)
        finite = bool(norm.isfinite())
        # The scaler has to see infinities: it lowers its factor then, and skips the step itself.
        if finite or self.accelerator.scaler is not None:
            for optimizer in optimizers:
                optimizer.step()
        return norm.detach(), finite

    def _schedule(self, step: int) -> None:
        factor = self.rate(step)
        rates = [(optimizer, parts.peak_rate(self.config, name)) for name, optimizer in self.optimizers.items()]
        if self.judge_optimizer is not None:
            rates.append((self.judge_optimizer, self.config.adversary.discriminator_rate))
        for optimizer, rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        if step >= self.config.steps_of(self.config.optimizer.revive_until) > 0:
            for codebook in self.codebooks:
                codebook.dead_code_threshold = 0.0

    def _draw(self, step: int, part: int) -> None:
        seed = np.random.SeedSequence([self.config.seed, 3, step, part, self.accelerator.process_index])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))

    def _synchronised(self, module: nn.Module, part: int, count: int):
        """Where the last of the passes is, gradients are exchanged; before it they only add up."""
        return contextlib.nullcontext() if part == count - 1 else self.accelerator.no_sync(module)


def _means(told: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([terms[name].float() for terms in told]).mean() for name in told[0]}
