"""`tokenflow train`: steps until there are no more, a state on disk that goes on from any of them.

Accelerate puts the networks on the rank's device, under autocast, and between ranks under DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor

from tokenflow.data.pictures import skipped_sentence
from tokenflow.models import Tokenizer, UniTok
from tokenflow.models.precision import fast_dtype
from tokenflow.training import parts
from tokenflow.training.config import Config
from tokenflow.training.folder import CONFIG, Folder, read_config
from tokenflow.training.monitor import Monitor, check_tensorboard, tell
from tokenflow.training.pictures import TrainingSet
from tokenflow.training.run import Interruption, WeightAverage
from tokenflow.training.sharding import ShardedAverage, ShardedModel, ShardedOptimizer
from tokenflow.training.step import Step
from tokenflow.training.teachers import FITTED_ON

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
PATIENCE = 20
"""Steps in a row without finite gradients after which a run stops."""


def train(config: Config) -> Path:
    """Train, or go on; returns the folder of the averaged weights.

    Raises:
        Missing: a package or weights that the recipe wants.
        FileNotFoundError: no such data, start, or file of weights.
        ValueError: settings that cannot be, a folder of another run, unreadable pictures, or gradients that stay infinite.
        KeyboardInterrupt: SIGINT or SIGTERM arrived; the state after the last whole step has been saved.
        OSError: the last checkpoint could not be written.
    """
    config.check()
    check_tensorboard(config)
    config = _decided(config)
    with _accelerated(config) as accelerator:
        folder = _Run(config, accelerator).go()
        accelerator.end_training()
        return folder


def _decided(config: Config) -> Config:
    """The config with the precision that "auto" stands for: the run's own where one goes on, else what the device is fast in."""
    if config.optimizer.precision != "auto":
        return config
    if (config.out / CONFIG).is_file():
        precision = read_config(config.out).optimizer.precision
    else:
        cpu = config.optimizer.cpu or not torch.cuda.is_available()
        precision = "bfloat16" if fast_dtype("cpu" if cpu else "cuda") == torch.bfloat16 else "float32"
    return replace(config, optimizer=replace(config.optimizer, precision=precision))


@contextlib.contextmanager
def _accelerated(config: Config) -> Iterator[Accelerator]:
    o, world = config.optimizer, int(os.environ.get("WORLD_SIZE", 1))
    cpu = o.cpu or not torch.cuda.is_available()
    if o.precision == "float16" and cpu:
        raise ValueError("train: precision: wanted float32 or bfloat16 on a CPU, got float16")
    if o.batch % (world * o.accumulate):
        raise ValueError(
            f"train: batch: wanted a multiple of {world * o.accumulate}, for {world} ranks of {o.accumulate} passes, got {o.batch}"
        )
    if o.shard and (world == 1 or o.precision == "float16"):
        raise ValueError(
            f"train: shard: wanted several ranks (torchrun) in float32 or bfloat16, got {world} in {o.precision}"
        )
    if o.matrix_rate and (o.shard or o.precision == "float16"):
        raise ValueError(
            f"train: matrix_rate: wanted 0 with {'--shard' if o.shard else 'float16'}, got {o.matrix_rate}: Muon takes whole "
            "matrices and unscaled gradients"
        )
    # Its state is the process's and outlives a run, which another precision in the next one would not.
    AcceleratorState._reset_state()
    # Every parameter that trains gets a gradient in every pass, and buffers are equal on all ranks by themselves.
    wrapping = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision=PRECISIONS[o.precision], cpu=cpu, kwargs_handlers=[wrapping])
    try:
        yield accelerator
    finally:
        AcceleratorState._reset_state()


class _Run:
    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, Folder(config.out)
        self.first_rank = accelerator.is_main_process
        torch.manual_seed(config.seed)
        model = parts.build_model(config)
        contrasts = isinstance(model, UniTok) and config.loss.contrastive and config.tune == "all"
        self.data = TrainingSet(config, model.image_size, model.config.context if contrasts else None)
        objective = parts.build_objective(config, model.image_size)
        judge = parts.build_discriminator(config, model.image_size)
        pictures = {"count": len(self.data.entries), "names": self.data.names()}
        if self.first_rank:
            self.folder.claim(config, pictures)
        # One rank finds the teacher's directions, the others read them.
        with accelerator.main_process_first():
            teacher = parts.build_teacher(config, model, lambda: self.data.samples(FITTED_ON), config.out)
        if self.first_rank:
            self.folder.begin(config, pictures)
        self.step = Step(config, accelerator, model, objective, judge, teacher)
        decay = config.optimizer.average
        self.average = WeightAverage(model, decay=decay) if decay else None
        self.done, self.broken = 0, dict.fromkeys(self.data.broken)

    def go(self) -> Path:
        try:
            self._restore()
            # A run may have been killed between its last checkpoint and the model's folder.
            if self.done >= self.config.optimizer.steps:
                self._write_model()
            self._train()
        finally:
            self.folder.release()
        if self.first_rank:
            if self.broken:
                print(skipped_sentence(list(self.broken)), file=sys.stderr)
            print(f"trained {self.done} steps: {self.folder.path / 'model'}")
        return self.folder.path / "model"

    def _train(self) -> None:
        log, steps = self.config.log, self.config.optimizer.steps
        samples = self.data.samples(log.pictures) if self.first_rank and log.pictures_every else torch.zeros(0)
        monitor = Monitor(self.config, self.folder, self.done, self.first_rank)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        lost = 0
        with Interruption() as interruption, monitor.watching() as bar:
            batches = self.data.batches(self.done, rank=rank, world=world)
            since, at = time.perf_counter(), self.done
            while self.done < steps:
                passes = [next(batches) for _ in range(self.config.optimizer.accumulate)]
                for sentence in (s for batch in passes for s in batch.broken):
                    self.broken.setdefault(sentence)
                told = self.step(self.done, passes)
                self.done += 1
                lost = self._lost(told.finite, lost)
                if told.finite and self.average is not None:
                    self.average.update()
                if self.done % log.log_every == 0 or self.done == steps:
                    values = self._gathered(told.terms)
                    now = time.perf_counter()
                    values["pictures_per_second"] = (self.done - at) * self.config.optimizer.batch / (now - since)
                    since, at = now, self.done
                    monitor.scalars(self.done, values, bar)
                bar.update()
                stopping = self._any(interruption.arrived)
                if log.pictures_every and (self.done % log.pictures_every == 0 or self.done == steps):
                    with self._finished_weights() as model:
                        monitor.grid(self.done, model, samples)
                if self.done % log.save_every == 0 or self.done == steps or stopping:
                    self._save(must=self.done == steps or stopping)
                if stopping and self.done < steps:
                    raise KeyboardInterrupt

    def _lost(self, finite: bool, lost: int) -> int:
        """Steps in a row that were left out."""
        if finite:
            return 0
        if lost == 0 and self.first_rank and self.accelerator.scaler is None:
            tell(f"step {self.done}: the gradient is not finite; the step is left out")
        if lost + 1 == PATIENCE:
            raise ValueError(
                f"train: the gradient was not finite for {PATIENCE} steps up to step {self.done}; the checkpoints are from before: "
                "a lower --rate or another --precision may help"
            )
        return lost + 1

    def _gathered(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Means over the ranks, the learning rate and the codebook's use since the last call."""
        names = sorted(terms)
        values = self.accelerator.reduce(torch.stack([terms[name].float() for name in names]), reduction="mean")
        means = dict(zip(names, values.tolist(), strict=True))
        if means.get("mse"):
            means["psnr"] = -10 * math.log10(means["mse"] / 4)
        quantizer = self.step.bare.quantizer
        use = {"codes_used": float(quantizer.usage()), "perplexity": float(quantizer.perplexity())}
        quantizer.reset_usage()
        return {**means, **use, "rate": self.step.optimizers["optimizer"].param_groups[0]["lr"]}

    def _any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    @contextlib.contextmanager
    def _finished_weights(self) -> Iterator[Any]:
        """The tokenizer as it is saved: averaged weights, eval mode. Of a sharded one on rank 0, None elsewhere."""
        if self.step.sharded:
            yield self.step.portrait.of(self.step.bare, self.average)
            return
        model = self.step.bare.eval()
        try:
            with contextlib.nullcontext() if self.average is None else self.average.applied():
                yield model
        finally:
            parts.training_mode(model, self.config)

    def _parts(self) -> dict[str, Any]:
        step, average = self.step, self.average
        found = {
            "model": step.bare, **step.optimizers, "average": average, "discriminator": step.bare_judge,
            "discriminator_optimizer": step.judge_optimizer, "lecam": step.objective.lecam, "scaler": self.accelerator.scaler,
        }  # fmt: skip
        if step.sharded:
            found["model"] = ShardedModel(step.bare)
            found["optimizer"] = ShardedOptimizer(step.bare, step.optimizers["optimizer"].optimizer)
            found["average"] = None if average is None else ShardedAverage(average)
        return {name: part for name, part in found.items() if part is not None}

    def _counters(self) -> dict[str, Tensor]:
        """Counts behind the codebook's use, which are no buffers."""
        return {
            f"{name}.{counter}": getattr(module, counter)
            for name, module in self.step.bare.named_modules()
            for counter in getattr(module, "counters", ())
        }

    def _save(self, *, must: bool) -> None:
        """The checkpoint, and the model's folder. A full disk ends the run only where this is the last chance."""
        counters = {name: self.accelerator.reduce(value.clone()) for name, value in self._counters().items()}
        if not (self.first_rank or self.step.sharded):
            return
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"step": self.done, "counters": counters, "broken": list(self.broken)}
        with self._finished_weights() as model:
            if self.first_rank:
                self._write(state, model, must)

    def _write_model(self) -> None:
        with self._finished_weights() as model:
            if self.first_rank:
                model.save_pretrained(self.folder.path / "model")

    def _write(self, state: dict[str, Any], model: Tokenizer, must: bool) -> None:
        try:
            self.folder.save(state, self.config.log.keep)
            model.save_pretrained(self.folder.path / "model")
        except OSError as error:
            if must:
                raise
            tell(f"{error}; training goes on, the former checkpoint is kept")

    def _restore(self) -> None:
        if self.first_rank:
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        state = self.folder.newest()
        self.done = 0 if state is None else state["step"]
        found = self.accelerator.gather(torch.tensor([self.done], device=self.accelerator.device)).tolist()
        if len(set(found)) > 1:
            raise ValueError(
                f"train: out: wanted a folder that all ranks share, got checkpoints of the steps {found} in {self.folder.path}"
            )
        if self.first_rank:
            self.folder.tidy(self.done)
        if state is None:
            return
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.broken |= dict.fromkeys(state["broken"])
        if self.first_rank:  # the others count on from nothing: it is the sum that is asked for
            for name, value in self._counters().items():
                value.copy_(state["counters"][name])
        if self.first_rank and self.done < self.config.optimizer.steps:
            print(f"going on from step {self.done}", file=sys.stderr)
