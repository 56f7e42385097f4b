"""What a measure is: something that sees pictures and reconstructions batch by batch and ends in named numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """One number and how it was measured.

    Attributes:
        name: what it is called.
        value: the number.
        protocol: what else than the pictures' crop decides about it.
        unit: "dB", "%" or nothing; for "%" the value is a share in [0, 1].
        digits: shown behind the point.
        error: standard error over the pictures, where there is one.
    """

    name: str
    value: float
    protocol: str
    unit: str = ""
    digits: int = 4
    error: float | None = None

    def __str__(self) -> str:
        """The number as a table shows it.

        >>> str(Measure("PSNR", 26.789, "", "dB", 2, 0.123)), str(Measure("use", 0.5, "", "%", 1))
        ('26.79 ± 0.12 dB', '50.0 %')
        """
        scale = 100 if self.unit == "%" else 1
        error = "" if self.error is None else f" ± {scale * self.error:.{self.digits}f}"
        return f"{scale * self.value:.{self.digits}f}{error}{f' {self.unit}' if self.unit else ''}"


class Seen(NamedTuple):
    """One batch.

    rows: positions [n] in the data set; originals, images: [n, 3, H, W] in [-1, 1]; indices: as `encode` gives them;
    codes: quantized features.
    """

    rows: list[int]
    originals: Tensor
    images: Tensor
    indices: Tensor
    codes: Tensor


class Meter(Protocol):
    """Collects what it needs of every batch.

    Attributes:
        name: of what it measures, for the reader who is told that it could not.
    """

    name: str

    def update(self, seen: Seen) -> None: ...

    def measures(self) -> list[Measure]:
        """The numbers; none where the pictures that were seen do not allow any."""
        ...


class PairMeter:
    """The mean over the pictures of a function of reconstruction and original.

    Args:
        name: of the number.
        function: (images, originals) -> [n].
        protocol, unit, digits: see `Measure`.
    """

    def __init__(
        self, name: str, function: Callable[[Tensor, Tensor], Tensor], protocol: str, unit: str = "", digits: int = 4
    ) -> None:
        self.name, self.function, self.rest = name, function, (protocol, unit, digits)
        self.values: list[Tensor] = []

    def update(self, seen: Seen) -> None:
        self.values.append(self.function(seen.images, seen.originals).double().cpu())

    def measures(self) -> list[Measure]:
        values = torch.cat(self.values)
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
        return [Measure(self.name, float(values.mean()), *self.rest, error)]


def rounded(images: Tensor) -> Tensor:
    """uint8 of images in [-1, 1]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
