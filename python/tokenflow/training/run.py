"""One training stage: its clock, progress bar, schedule, log and checkpoints.

A stage runs for a number of seconds, so that a slower machine finishes in the same time with fewer steps, or for a number of
steps, so that the same seed gives the same result. It writes its whole state every `every` seconds to one file, under a
temporary name first; the same call after a crash, a kill or Ctrl-C goes on from there.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm


class Stateful(Protocol):
    """What a stage can keep: modules, optimisers, averages."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def write_atomically(value: Any, path: Path) -> None:
    """torch.save under a temporary name, flushed to disk, then renamed: `path` is always whole or absent."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as handle:
        torch.save(value, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


class Stage:
    """Clock, bar, schedule, log and checkpoint of one training.

    Args:
        name: shown on the bar; the checkpoint is `directory / (name + ".ckpt")`.
        directory: where the checkpoint lies.
        seconds: training time, summed over restarts. Ignored when `steps` is given.
        steps: number of steps instead of a time.
        seed: seeds the torch generator at the first start.
        settings: what must be equal for a checkpoint to be continued (seed is added).
        every: seconds between two checkpoints.
        dtype: the type that networks compute in. A checkpoint of another goes on all the same, since weights stay float32, and
            says so: a faster machine must not lose what was trained. `dtypes` tells all that were used.
        parts: what is saved and restored, by name.

    Raises:
        ValueError: the checkpoint was written with other settings.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(2, 2)
        >>> stage = Stage("doc", Path(tempfile.mkdtemp()), steps=3, seed=0, parts={"model": model})
        >>> [stage.log(loss=1.0 / (step + 1)) for step in stage]
        [None, None, None]
        >>> stage.finished, stage.history["loss"]
        (True, [(0, 1.0), (1, 0.5), (2, 0.3333333333333333)])
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        seconds: float = 0.0,
        steps: int | None = None,
        seed: int,
        parts: dict[str, Stateful],
        settings: dict[str, Any] | None = None,
        every: float = 20.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.seconds, self.steps, self.every, self.parts = name, seconds, steps, every, parts
        self.path = Path(directory) / f"{name}.ckpt"
        self.settings = {**(settings or {}), "seed": seed}
        self.step, self.elapsed, self.finished = 0, 0.0, False
        self.dtypes = [str(dtype).removeprefix("torch.")]
        self.history: dict[str, list[tuple[int, float]]] = {}
        torch.manual_seed(seed)
        if self.path.exists():
            self._restore(torch.load(self.path, weights_only=True))
        # The same budget was used up: nothing is left to do. A longer one goes on.
        self.finished = self.finished and self.progress >= 1.0

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        if self.steps is not None:
            return min(1.0, self.step / max(1, self.steps))
        return min(1.0, self.elapsed / max(1e-9, self.seconds))

    def rate(self, peak: float, *, warmup: int, floor: float = 0.02) -> float:
        """Learning rate now: linear over `warmup` steps, then a cosine over the budget down to `floor` times the peak."""
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self.progress))
        return peak * cosine * min(1.0, (self.step + 1) / warmup)

    def set_rate(self, optimizer: torch.optim.Optimizer, peak: float, *, warmup: int, floor: float = 0.02) -> None:
        """Give `rate` to every group of the optimiser, times the group's own "scale" if it has one."""
        rate = self.rate(peak, warmup=warmup, floor=floor)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)

    def log(self, **values: float | Tensor) -> None:
        """Add one point a name to the history, which the checkpoint keeps."""
        for key, value in values.items():
            self.history.setdefault(key, []).append((self.step, float(value)))

    def __iter__(self) -> Iterator[int]:
        """Yield the step numbers until the budget is used up; the checkpoint is written on the way and at the end.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM arrived; the state after the last whole step has been saved.
        """
        if self.finished:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        by_steps = self.steps is not None
        total = self.steps if by_steps else self.seconds
        bar = tqdm(
            total=round(total, 1),
            initial=round(self.step if by_steps else self.elapsed, 1),
            desc=self.name,
            unit="step" if by_steps else "s",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {remaining} left{postfix}",
        )
        before, start = self.elapsed, time.perf_counter()
        saved = start
        with bar, Interruption() as interruption:
            while self.progress < 1.0:
                yield self.step
                self.step += 1
                now = time.perf_counter()
                self.elapsed = before + now - start
                bar.n = self.step if by_steps else min(self.seconds, self.elapsed)
                last = {key: points[-1][1] for key, points in self.history.items()}
                bar.set_postfix_str(
                    ", ".join([f"step {self.step}", *(f"{k} {v:.3g}" for k, v in last.items())]), refresh=False
                )
                bar.refresh() if self.progress >= 1.0 else bar.update(0)
                if interruption.arrived:
                    self.save()
                    raise KeyboardInterrupt
                if now - saved > self.every and self.progress < 1.0:
                    self.save()
                    saved = time.perf_counter()
        self.finished = True
        self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        write_atomically(
            {
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
                "settings": self.settings,
                "step": self.step,
                "elapsed": self.elapsed,
                "finished": self.finished,
                "history": self.history,
                "dtypes": self.dtypes,
                "rng": torch.get_rng_state(),
            },
            self.path,
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["settings"] != self.settings:
            changed = sorted(
                k for k in {*saved["settings"], *self.settings} if saved["settings"].get(k) != self.settings.get(k)
            )
            told = ", ".join(f"{k} {self.settings.get(k)} instead of {saved['settings'].get(k)}" for k in changed)
            raise ValueError(
                f"{self.name}: {self.path} belongs to a run with other settings ({told}): "
                "choose another output folder, or delete that file to train anew"
            )
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        self.step, self.elapsed, self.finished = saved["step"], saved["elapsed"], saved["finished"]
        self.history = saved["history"]
        torch.set_rng_state(saved["rng"])
        before, now = saved.get("dtypes", []), self.dtypes[0]
        if before and before[-1] != now and not (self.finished and self.progress >= 1.0):
            print(f"{self.name}: goes on in {now}; until step {self.step} it was trained in {before[-1]}", flush=True)
            self.dtypes = [*before, now]
        elif before:
            self.dtypes = before


class Interruption:
    """Context in which SIGINT and SIGTERM only set `arrived`, so that a step is never cut in half; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.arrived = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.arrived:
            raise KeyboardInterrupt
        self.arrived = True


class WeightAverage:
    """Exponential moving average of a module's parameters: a <- d a + (1 - d) w, d = min(decay, (1 + t) / (10 + t)).

    Buffers are not averaged; `copy_to` takes them from the module as they are.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.module = module
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.average.values()), list(self.module.parameters()), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give `module`, of the same class, the averaged parameters and the module's own buffers."""
        module.load_state_dict({**self.module.state_dict(), **self.average})

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)


def batch_rows(step: int, count: int, batch: int, seed: int) -> Tensor:
    """Rows of batch number `step`: every epoch is a fresh permutation of `count` rows that depends on seed and epoch alone.

    The last rows of an epoch that do not fill a batch are left out; a count below `batch` gives all rows.

    Example:
        >>> sorted(torch.cat([batch_rows(s, 6, 3, seed=0) for s in (0, 1)]).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    per_epoch = max(1, count // batch)
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[index * batch : (index + 1) * batch]
