"""TokenFlow: one index a token for what a picture means and how it looks.

    h = [semantic encoder(x), pixel encoder(x)]   ->   multi-scale residual search, one id for both halves   ->   f
    x' = pixel decoder(pixel half of f),   teacher's features ~ semantic decoder(semantic half of f)

Source: Qu et al., "TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation", CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenflow.models import tiny
from tokenflow.models.tokenizer import Tokenizer
from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer


@dataclass(frozen=True)
class Config:
    """Sizes of a TokenFlow model: picture side, grid scales (the last is the grid), widths, codebook and teacher."""

    image_size: int = 64
    scales: tuple[int, ...] = (1, 2, 4, 8, 16)
    semantic_dim: int = 24
    pixel_dim: int = 8
    codebook_size: int = 2048
    pixel_weight: float = 4.0
    commitment_weight: float = 0.25
    decay: float = 0.98
    scale_dropout: float = 0.1
    dead_code_threshold: float = 0.3
    widths: tuple[int, int, int] = (32, 64, 128)
    teacher_dim: int = 128


PRESETS = {"tokenflow-tiny": Config()}


class Output(NamedTuple):
    """What training needs: images [B, 3, H, W], semantic [B, teacher_dim, h, w], indices [B, L], loss (commitment, 0-dim)."""

    images: Tensor
    semantic: Tensor
    indices: Tensor
    loss: Tensor


class TokenFlow(Tokenizer):
    """A tokenizer with a semantic and a pixel codebook under one index, over several scales.

    Args:
        config: the sizes.

    Example:
        >>> model = TokenFlow.from_preset("tokenflow-tiny").eval()
        >>> images = torch.zeros(1, 3, 64, 64)
        >>> indices = model.encode(images)
        >>> indices.shape, model.decode(indices).shape, model.features(images).shape
        (torch.Size([1, 341]), torch.Size([1, 3, 64, 64]), torch.Size([1, 32, 16, 16]))
    """

    kind = "tokenflow"
    config_type = Config
    presets = PRESETS

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        side, (a, b, c) = config.scales[-1], config.widths
        self.pixel_encoder = tiny.pixel_encoder(config.pixel_dim, (a, b, c), side)
        self.pixel_decoder = tiny.pixel_decoder(config.pixel_dim, (a, b, c), side)
        self.semantic_encoder = tiny.SemanticEncoder(config.semantic_dim, (b, c), side)
        self.semantic_decoder = tiny.SemanticDecoder(config.semantic_dim, c, side, config.teacher_dim)
        codes = SharedIndexQuantizer(
            (config.semantic_dim, config.pixel_dim),
            config.codebook_size,
            weights=(1.0, config.pixel_weight),
            update="ema",
            decay=config.decay,
            commitment_weight=config.commitment_weight,
            dead_code_threshold=config.dead_code_threshold,
        )
        self.quantizer = MultiScaleQuantizer(codes, config.scales, scale_dropout=config.scale_dropout)

    def encode_features(self, images: Tensor) -> Tensor:
        """Features before the quantizer, semantic channels first: [B, 32, 16, 16] from images [B, 3, 64, 64] in [-1, 1].

        Raises:
            TypeError: images are not floating point.
            ValueError: another shape.
        """
        images = self.checked(images)
        if len(images) == 0:
            side, width = self.config.scales[-1], self.config.semantic_dim + self.config.pixel_dim
            return images.new_zeros(0, width, side, side)
        return torch.cat([self.semantic_encoder(images), self.pixel_encoder(images)], 1)

    def decode_features(self, features: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] from accumulated features [B, 32, 16, 16]; only the pixel half is read."""
        pixel = self._halves(features)[1]
        if len(pixel) == 0:
            return pixel.new_zeros(0, 3, self.config.image_size, self.config.image_size)
        return self.pixel_decoder(pixel.to(self.dtype).contiguous(memory_format=torch.channels_last))

    def decode_semantic(self, features: Tensor) -> Tensor:
        """What the teacher would say, [B, teacher_dim, 8, 8], from accumulated features [B, 32, 16, 16]."""
        return self.semantic_decoder(self._halves(features)[0].to(self.dtype))

    def forward(self, images: Tensor) -> Output:
        """Everything that training needs, from images [B, 3, 64, 64] in [-1, 1]."""
        quantized, indices, loss = self.quantize(self.encode_features(images))
        return Output(self.decode_features(quantized), self.decode_semantic(quantized), indices, loss)

    def _halves(self, features: Tensor) -> tuple[Tensor, Tensor]:
        want = self.config.semantic_dim + self.config.pixel_dim
        if features.dim() != 4 or features.shape[1] != want:
            raise ValueError(f"decode_features: features: wanted [B, {want}, h, w], got {list(features.shape)}")
        return features.split([self.config.semantic_dim, self.config.pixel_dim], 1)
