"""The pictures of every step: a function of seed, step and place in the batch, whatever the workers, ranks and restarts.

    row(step, place) = order(seed, epoch)[B index + place],   (epoch, index) = divmod(step, floor(N / B))

for N pictures in batches of B. Ranks and accumulated passes take equal stretches of a batch. A picture that cannot be read
gives its place to another one, drawn from the same numbers.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenflow.data.entries import Entry, data_set
from tokenflow.data.pictures import fitted, opened
from tokenflow.models.text import TextTokenizer
from tokenflow.training.config import Config
from tokenflow.training.run import batch_rows

TRIES = 64
"""Pictures that may be broken one after another before the data set is given up."""


class Batch(NamedTuple):
    """images: uint8 [n, 3, H, W]; words: ids [c, context] of the captions of pictures `captioned` [c], None where nobody asks
    for them; broken: a sentence about each picture that could not be read; failure: why there is no batch."""

    images: Tensor
    words: Tensor | None
    captioned: Tensor
    broken: list[str]
    failure: str = ""


class TrainingSet:
    """The pictures of a data set, in training.

    Args:
        config: of the run.
        size: height and width of the images.
        context: length of a row of words; None for a model that reads none.

    Raises:
        FileNotFoundError: no such data, or no such vocabulary.
        ValueError: fewer pictures than a batch has, or no captions where they are wanted.
    """

    def __init__(self, config: Config, size: tuple[int, int], context: int | None = None) -> None:
        self.config, self.size = config, size
        # A run that lies among its pictures writes pictures of its own there.
        self.entries, self.broken = data_set(config.data, without=config.out)
        batch = config.optimizer.batch
        if len(self.entries) < batch:
            reason = f" ({self.broken[0]})" if self.broken else ""
            raise ValueError(
                f"train: data: wanted at least one batch of {batch} pictures (--batch), "
                f"got {len(self.entries) or 'none'} in {config.data}{reason}"
            )
        self.words = None if context is None else self._words(context)

    def _words(self, context: int) -> TextTokenizer:
        if self.config.picture.words is None:
            raise ValueError(
                "train: words: wanted CLIP's tokenizer.json for the contrastive term (--words FILE), got none; "
                "--contrastive 0 trains without captions"
            )
        if not any(entry.caption for entry in self.entries):
            raise ValueError(
                f"train: data: wanted captions (captions.csv, or .txt beside the pictures) for the contrastive term, got "
                f"none in {self.config.data}; --contrastive 0 trains without them"
            )
        # Its threads must not be forked into the workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return TextTokenizer(self.config.picture.words, context)

    def names(self) -> str:
        """Sixteen hex digits that name the pictures."""
        return hashlib.sha256("\n".join(entry.key for entry in self.entries).encode()).hexdigest()[:16]

    def batches(self, first: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The passes of steps `first`, `first` + 1, ... of one rank, `accumulate` a step.

        Raises:
            ValueError: too many pictures are broken.
        """
        reading = _Reading(self)
        plan = _Plan(self.config, len(self.entries), first, rank, world)
        workers = self.config.picture.workers
        loader = DataLoader(
            reading,
            batch_sampler=plan,
            num_workers=workers,
            collate_fn=reading.together,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_stopping,
        )
        for batch in loader:
            if batch.failure:
                raise ValueError(batch.failure)
            yield batch

    def samples(self, count: int) -> Tensor:
        """uint8 [count, 3, H, W]: the centre of pictures that stay the same through the run, readable ones."""
        order = np.random.default_rng([self.config.seed, 2]).permutation(len(self.entries))
        found: list[Tensor] = []
        for row in order[: count + TRIES]:
            if len(found) < count:
                image = _read(self.entries[row], lambda image: fitted(image, self.size))
                found += [image] if isinstance(image, Tensor) else []
        return torch.stack(found) if found else torch.zeros(0, 3, *self.size, dtype=torch.uint8)


def _leave_stopping(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal, and SIGTERM every process of a job; when to stop is the training process's to
    say, which saves first. A second SIGTERM ends a worker that hangs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class Place(NamedTuple):
    """Where a picture stands: step, place in the whole batch, row in the data set."""

    step: int
    place: int
    row: int


class _Plan:
    """The places of each pass of one rank, as a batch sampler."""

    def __init__(self, config: Config, count: int, first: int, rank: int, world: int) -> None:
        self.config, self.count, self.first, self.rank, self.world = config, count, first, rank, world

    def __iter__(self) -> Iterator[list[Place]]:
        o = self.config.optimizer
        size = o.batch // self.world // o.accumulate
        for step in range(self.first, o.steps):
            rows = batch_rows(step, self.count, o.batch, self.config.seed).tolist()
            for part in range(o.accumulate):
                begin = (part * self.world + self.rank) * size
                yield [Place(step, place, rows[place]) for place in range(begin, begin + size)]


class _Reading(Dataset):
    def __init__(self, data: TrainingSet) -> None:
        self.entries, self.size, self.words = data.entries, data.size, data.words
        self.config, self.seed = data.config.picture, data.config.seed

    def __getitem__(self, at: Place) -> tuple[Tensor | None, str, list[str]]:
        """The picture at a place, its caption, and a sentence about each that was broken."""
        draw = np.random.default_rng([self.seed, 1, at.step, at.place])
        row, broken = at.row, []
        for _ in range(TRIES):
            entry = self.entries[row]
            image = _read(entry, lambda image: self.augmented(image, draw))
            if isinstance(image, Tensor):
                return image, entry.caption, broken
            broken.append(image)
            row = int(draw.integers(len(self.entries)))
        return None, "", broken

    def augmented(self, image: Image.Image, draw: np.random.Generator) -> Tensor:
        """A picture of its size, uint8 [3, H, W], by draws that are its own."""
        size = self.size
        if self.config.crop == "random":
            share = self.config.smallest_crop + (1 - self.config.smallest_crop) * float(draw.random())
            pixels = fitted(image, size, share, (float(draw.random()), float(draw.random())))
        else:
            pixels = fitted(image, size)
        return pixels.flip(2) if self.config.flip and draw.random() < 0.5 else pixels

    def together(self, items: Sequence[tuple[Tensor | None, str, list[str]]]) -> Batch:
        broken = [sentence for _, _, sentences in items for sentence in sentences]
        if any(image is None for image, _, _ in items):
            failure = (
                f"train: data: wanted pictures, got {TRIES} one after another that cannot be read, such as {broken[-1]}"
            )
            return Batch(torch.zeros(0), None, torch.zeros(0), broken, failure)
        captions = [caption for _, caption, _ in items]
        captioned = torch.tensor([i for i, caption in enumerate(captions) if caption], dtype=torch.int64)
        words = None if self.words is None else self.words([captions[i] for i in captioned])
        return Batch(torch.stack([image for image, _, _ in items]), words, captioned, broken)


def _read(entry: Entry, make) -> Tensor | str:
    """The picture as `make` makes it, or a sentence."""
    try:
        return make(opened(entry.read()))
    except Exception as error:  # decoders raise anything on torn files, and one of them must not end a run of days
        reason = (str(error).splitlines() or [""])[0]
        return f"{entry.key}: {reason or type(error).__name__}"
