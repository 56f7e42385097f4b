"""What every tokenizer of the family is: images to token ids and back.

    features = encode_features(images)  ->  ids = quantizer.encode(features)  ->  codes = quantizer.decode(ids)
    images'  = decode_features(codes)

The quantizer works in float32 whatever the model's or autocast's type, so that a bfloat16 model has one definition of its
tokens: those of its own features.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tokenflow.models import layout
from tokenflow.models.image_processor import ImageProcessor
from tokenflow.models.model import Model
from tokenflow.models.precision import full, without_autocast
from tokenflow_ext.quantize import Quantized


class Output(NamedTuple):
    """What training needs: images [B, 3, H, W], ids, and the quantizer's loss (0-dim)."""

    images: Tensor
    indices: Tensor
    loss: Tensor


class Tokenizer(Model):
    """A tokenizer for images: the class itself reads presets, folders and files of every one of its subclasses that is imported.

    A subclass also makes `self.quantizer` (which has `forward`, `encode` and `decode`) and defines `encode_features`,
    `decode_features` and `image_size`.
    """

    def summary(self) -> dict[str, str]:
        """Rows about the model for a reader: variant, sizes, parameters."""
        rows = super().summary()
        height, width = self.image_size
        return {"model": rows.pop("model"), "images": f"{height} x {width}", **rows}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json into `folder`, each whole or not at all."""
        self.image_processor().save_pretrained(Path(folder))
        super().save_pretrained(folder)

    def image_processor(self) -> ImageProcessor:
        """What makes pictures of any size into images for this model."""
        return ImageProcessor(self.image_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        size = self.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def train(self, mode: bool = True) -> typing.Self:
        """Training or eval mode; in eval mode convolutions keep their weights channels last, see `layout`."""
        super().train(mode)
        layout.follow_mode(self)
        return self

    def encode_features(self, images: Tensor) -> Tensor:
        """Features before the quantizer, from images [B, 3, H, W] in [-1, 1]."""
        raise NotImplementedError

    def decode_features(self, features: Tensor) -> Tensor:
        """Images [B, 3, H, W], not clamped, from quantized features."""
        raise NotImplementedError

    def quantize(self, features: Tensor) -> Quantized:
        """The quantizer on features, in float32 (float64 for float64) whatever autocast says."""
        with without_autocast(features):
            return self.quantizer(full(features))

    def forward(self, images: Tensor) -> NamedTuple:
        """Everything that training needs, from images [B, 3, H, W] in [-1, 1]."""
        quantized, indices, loss = self.quantize(self.encode_features(images))
        return Output(self.decode_features(quantized), indices, loss)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids of images [B, 3, H, W] in [-1, 1]: [B, L], coarse scales first, or [B, G, L] for G codebooks."""
        features = self.encode_features(images)
        with without_autocast(images):
            return self.quantizer.encode(full(features))

    def codes(self, indices: Tensor) -> Tensor:
        """The quantized features of token ids."""
        return self.quantizer.decode(indices)

    def split(self, indices: Tensor) -> list[Tensor]:
        """Token ids [B, L] as one map [B, h, w] a scale, where there are scales."""
        return [indices]

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] from token ids; a prefix of whole scales gives a coarser picture."""
        images = self.decode_features(self.codes(indices))
        return full(images).clamp(-1, 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The quantized features: what a language model reads."""
        return self.codes(self.encode(images))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images))."""
        return self.decode(self.encode(images))

    def checked(self, images: Tensor) -> Tensor:
        """Images in the model's own type, channels last.

        Raises:
            TypeError: images are not floating point.
            ValueError: another shape.
        """
        height, width = self.image_size
        check_floating(images)
        if images.dim() != 4 or images.shape[1:] != (3, height, width):
            raise ValueError(f"encode: images: wanted [B, 3, {height}, {width}], got {list(images.shape)}")
        return images.to(self.dtype).contiguous(memory_format=torch.channels_last)


def check_floating(images: Tensor) -> None:
    """Raises TypeError unless images are a tensor of floating point values."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"encode: images: wanted a tensor of floating point values in [-1, 1], got {got}")
