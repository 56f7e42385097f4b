"""TokenFlow: one index a token for what a picture means and how it looks.

    h = [semantic encoder(x), pixel encoder(x)]   ->   multi-scale residual search, one id for both halves   ->   f
    x' = pixel decoder(pixel half of f),   teacher's features ~ semantic decoder(semantic half of f)

The quantizer works in float32 whatever the autocast type, so that a bfloat16 model has one definition of its tokens: those of
its own features.

Source: Qu et al., "TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation", CVPR 2025.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenflow.models import tiny
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


class TokenFlow(nn.Module):
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

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
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

    @classmethod
    def from_preset(cls, name: str) -> TokenFlow:
        """A fresh model of a named size.

        Raises:
            ValueError: no preset has that name.
        """
        if name not in PRESETS:
            raise ValueError(f"from_preset: name: wanted one of {', '.join(PRESETS)}, got {name!r}")
        return cls(PRESETS[name])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model": "tokenflow", **asdict(self.config)}, indent=2) + "\n")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TokenFlow:
        """The model that `save_pretrained` wrote, in eval mode.

        Raises:
            FileNotFoundError: the folder lacks config.json or model.safetensors.
            ValueError: config.json describes another model.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"from_pretrained: folder: wanted a folder with config.json and model.safetensors, got {folder} without {name}"
                )
        values = json.loads((folder / "config.json").read_text())
        if values.pop("model", None) != "tokenflow":
            raise ValueError(
                f"from_pretrained: folder: wanted a tokenflow model, got another in {folder / 'config.json'}"
            )
        model = cls(Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()

    def encode_features(self, images: Tensor) -> Tensor:
        """Features before the quantizer, semantic channels first: [B, 32, 16, 16] from images [B, 3, 64, 64] in [-1, 1].

        Raises:
            TypeError: images are not floating point.
            ValueError: another shape.
        """
        self._check_images(images)
        if len(images) == 0:
            return images.new_zeros(
                0, self.config.semantic_dim + self.config.pixel_dim, self.config.scales[-1], self.config.scales[-1]
            )
        images = images.contiguous(memory_format=torch.channels_last)
        return torch.cat([self.semantic_encoder(images), self.pixel_encoder(images)], 1)

    def decode_features(self, features: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] from accumulated features [B, 32, 16, 16]; only the pixel half is read."""
        pixel = self._halves(features)[1]
        if len(pixel) == 0:
            return pixel.new_zeros(0, 3, self.config.image_size, self.config.image_size)
        return self.pixel_decoder(pixel.contiguous(memory_format=torch.channels_last))

    def decode_semantic(self, features: Tensor) -> Tensor:
        """What the teacher would say, [B, teacher_dim, 8, 8], from accumulated features [B, 32, 16, 16]."""
        return self.semantic_decoder(self._halves(features)[0])

    def forward(self, images: Tensor) -> Output:
        """Everything that training needs, from images [B, 3, 64, 64] in [-1, 1]."""
        features = self.encode_features(images)
        with torch.autocast(images.device.type, enabled=False):
            quantized, indices, loss = self.quantizer(features.float())
        return Output(self.decode_features(quantized), self.decode_semantic(quantized), indices, loss)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids [B, 341] of images [B, 3, 64, 64] in [-1, 1], coarse scales first."""
        features = self.encode_features(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.quantizer.encode(features.float())

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] from token ids [B, L] of whole scales; a prefix gives a coarser picture."""
        return self.decode_features(self.quantizer.decode(indices)).float().clamp(-1, 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The accumulated codes [B, 32, 16, 16], semantic channels first: what a language model reads."""
        return self.quantizer.decode(self.encode(images))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images))."""
        return self.decode(self.encode(images))

    def _halves(self, features: Tensor) -> tuple[Tensor, Tensor]:
        want = self.config.semantic_dim + self.config.pixel_dim
        if features.dim() != 4 or features.shape[1] != want:
            raise ValueError(f"decode_features: features: wanted [B, {want}, h, w], got {list(features.shape)}")
        return features.split([self.config.semantic_dim, self.config.pixel_dim], 1)

    def _check_images(self, images: Tensor) -> None:
        size = self.config.image_size
        if not images.is_floating_point():
            raise TypeError(f"encode: images: wanted floating point values in [-1, 1], got {images.dtype}")
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"encode: images: wanted [B, 3, {size}, {size}], got {list(images.shape)}")
