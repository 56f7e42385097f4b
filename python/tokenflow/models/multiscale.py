"""Tokenizers whose ids lie in a pyramid of scales: what follows from a picture's size and a list of scales."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenflow.models.tokenizer import Tokenizer
from tokenflow_ext.quantize import MultiScaleQuantizer

Scales = Sequence[int | tuple[int, int]]


def fitted_scales(scales: Scales, grid: tuple[int, int]) -> tuple:
    """A list of scales for another grid: those smaller than it, then the grid. For a grid that is not square, scales of the
    longer side shrink with it on the shorter one.

    Example:
        >>> fitted_scales((1, 2, 4, 6, 8, 10, 12, 14), (16, 16))
        (1, 2, 4, 6, 8, 10, 12, 14, 16)
        >>> fitted_scales((1, 2, 4, 8), (8, 4))
        ((1, 1), (2, 1), (4, 2), (8, 4))
    """
    longest = max(grid)
    sides = [s for s in (max(scale) if isinstance(scale, tuple) else scale for scale in scales) if s < longest]
    if grid[0] == grid[1]:
        return (*sides, longest)
    return (*(tuple(max(1, round(s * n / longest)) for n in grid) for s in sides), tuple(grid))


class MultiScaleTokenizer(Tokenizer):
    """A tokenizer around a MultiScaleQuantizer. A subclass also defines `grid_of` and `make_quantizer`."""

    quantizer: MultiScaleQuantizer

    def __init__(self, config: Any) -> None:
        super().__init__(self.changed(config, {}))

    @classmethod
    def grid_of(cls, config: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the map of features of images of that size.

        Raises:
            ValueError: no such images.
        """
        raise NotImplementedError

    @classmethod
    def changed(cls, config: Any, values: Mapping[str, Any]) -> Any:
        """Images of another size without scales of their own take `fitted_scales`.

        Raises:
            ValueError: sizes or scales that cannot be.
        """
        config = super().changed(config, values)
        if not isinstance(config.scales, Sequence) or not config.scales:
            raise ValueError(f"{cls.__name__}: scales: wanted a list of at least one, got {config.scales}")
        for name, sides in (("image_size", config.image_size), *(("scales", s) for s in config.scales)):
            pair = _pair(sides)
            if len(pair) != 2 or not all(type(n) is int for n in pair):
                raise ValueError(f"{cls.__name__}: {name}: wanted an integer, or height and width, got {sides!r}")
        size = _pair(config.image_size)
        grid = cls.grid_of(config, size)
        scales = (
            fitted_scales(config.scales, grid) if "image_size" in values and "scales" not in values else config.scales
        )
        scales = tuple(tuple(s) if isinstance(s, Sequence) else s for s in scales)
        if any(min(p) < 1 or p[0] > grid[0] or p[1] > grid[1] for p in map(_pair, scales)):
            raise ValueError(f"{cls.__name__}: scales: wanted sides of 1 to {grid[0]} x {grid[1]} cells, got {scales}")
        return replace(config, image_size=size[0] if size[0] == size[1] else size, scales=scales)

    def make_quantizer(self) -> MultiScaleQuantizer:
        """The quantizer of `self.config`, around the codebooks of the one that is there, if any."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the map of features."""
        return self.grid_of(self.config, self.image_size)

    def resize(self, image_size: int | tuple[int, int], scales: Scales | None = None) -> typing.Self:
        """The same weights for images of another size, or other scales; learned positions are stretched as they are used.

        Args:
            image_size: side, or height and width.
            scales: coarse to fine; by default the present ones that are smaller than the new grid, and the grid.

        Raises:
            ValueError: sizes or scales that cannot be.

        Example:
            TokenFlow.from_checkpoint("tokenflow_clipb_32k_enhanced.pt").resize(256)
        """
        values = {"image_size": image_size} if scales is None else {"image_size": image_size, "scales": scales}
        self.config = self.changed(self.config, values)
        self.quantizer = self.make_quantizer().train(self.training)
        return self

    def codes(self, indices: Tensor) -> Tensor:
        return self.quantizer.decode(indices, size=self.grid)

    def split(self, indices: Tensor) -> list[Tensor]:
        return self.quantizer.split(indices)

    def summary(self) -> dict[str, str]:
        height, width = self.grid
        scales = [_pair(s) for s in self.config.scales]
        tables = self.quantizer.codebooks()
        others = {
            name: config.image_size
            for name, config in self.presets.items()
            if config != self.config
            and config == replace(self.config, image_size=config.image_size, scales=config.scales)
        }
        same = {"also": ", ".join(f"{name} by resize({size})" for name, size in others.items())} if others else {}
        return {
            **super().summary(),
            **same,
            "grid": f"{height} x {width}",
            "scales": ", ".join(str(h) if h == w else f"{h} x {w}" for h, w in scales),
            "tokens": f"{sum(h * w for h, w in scales)} an image",
            "codes": f"{tables[0].shape[0]} of {' + '.join(str(t.shape[1]) for t in tables)} channels",
        }

    def empty_features(self, images: Tensor, width: int) -> Tensor:
        """Features [0, width, h, w] of no images."""
        return torch.zeros(0, width, *self.grid, dtype=images.dtype, device=images.device)


def _pair(sides: int | Sequence[int]) -> tuple[int, int]:
    return tuple(sides) if isinstance(sides, Sequence) else (sides, sides)
