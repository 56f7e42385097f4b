"""Pictures of a data set in batches, decoded by worker processes; what cannot be decoded is named instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenflow.data.entries import Entry
from tokenflow.data.pictures import opened, read_picture
from tokenflow.models import Tokenizer
from tokenflow.models.image_processor import ImageProcessor

RESIZE = ("area", "bicubic", "model")


@dataclass(frozen=True)
class Crop:
    """Encoded picture to uint8 [3, h, w]: the middle of it, in the wanted shape and size.

    Attributes:
        size: height and width.
        resize: "area" averages, as this package's own training reads pictures; "bicubic" is an image processor's default; "model"
            is what `processor` does.
        processor: the model's.
    """

    size: tuple[int, int]
    resize: str = "area"
    processor: ImageProcessor | None = None

    def __post_init__(self) -> None:
        if self.resize not in RESIZE:
            raise ValueError(f"Crop: resize: wanted one of {', '.join(RESIZE)}, got {self.resize!r}")
        if self.resize == "model" and (self.processor is None or self.processor.size != self.size):
            raise ValueError(f"Crop: processor: wanted the model's, of size {self.size}, got {self.processor}")

    @classmethod
    def of(cls, model: Tokenizer, resize: str) -> Crop:
        """What makes images for a model."""
        return cls(model.image_size, resize, model.image_processor())

    def __call__(self, content: bytes) -> Tensor:
        if self.resize == "area":
            return read_picture(content, self.size)
        return self._processor().pixels(opened(content))

    def __str__(self) -> str:
        if self.resize == "area":
            return f"centre crop {self.size[0]} x {self.size[1]}, area-averaged"
        return str(self._processor())

    def _processor(self) -> ImageProcessor:
        return self.processor if self.resize == "model" else ImageProcessor(self.size)


class Loaded(NamedTuple):
    """rows: positions [n] of those that could be read; images: uint8 [n, 3, h, w]; broken: a sentence about each of the others."""

    rows: list[int]
    images: Tensor
    broken: list[str]


class _Decoded(Dataset):
    def __init__(self, entries: Sequence[Entry], crop: Crop) -> None:
        self.entries, self.crop = entries, crop

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str]:
        entry = self.entries[row]
        try:
            return row, self.crop(entry.read())
        except Exception as error:  # decoders raise anything on torn files, and one of them must not end a run of hours
            reason = (str(error).splitlines() or [""])[0]
            return row, f"{entry.key}: {reason or type(error).__name__}"

    def together(self, items: list[tuple[int, Tensor | str]]) -> Loaded:
        read = [(row, value) for row, value in items if isinstance(value, Tensor)]
        images = torch.stack([v for _, v in read]) if read else torch.zeros(0, 3, *self.crop.size, dtype=torch.uint8)
        return Loaded([row for row, _ in read], images, [value for _, value in items if isinstance(value, str)])


def loaded(
    entries: Sequence[Entry], batches: Sequence[Sequence[int]], crop: Crop, *, workers: int = 0
) -> Iterator[Loaded]:
    """The pictures at the rows of each batch, in order.

    Args:
        entries: the data set.
        batches: rows of each batch.
        crop: makes a picture of what was read.
        workers: processes that decode; 0 decodes in this one.
    """
    decoded = _Decoded(entries, crop)
    return iter(DataLoader(decoded, batch_sampler=list(batches), num_workers=workers, collate_fn=decoded.together))


def as_float(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 images."""
    return images.float().div_(127.5).sub_(1.0)
