"""TokenFlow: one index a token for what a picture means and how it looks.

    h = [semantic encoder(x), pixel encoder(x)]   ->   multi-scale residual search, one id for both halves   ->   f
    x' = pixel decoder(pixel half of f),   teacher's features ~ semantic decoder(semantic half of f)

Source: Qu et al., "TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation", CVPR 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.models import checkpoint, conv, tiny, tokenflow_keys
from tokenflow.models.multiscale import MultiScaleTokenizer
from tokenflow.models.semantic import SemanticDecoder, SemanticEncoder, Tower
from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer


@dataclass(frozen=True)
class Config:
    """Sizes of a TokenFlow model.

    Attributes:
        image_size: side of the images, or height and width.
        scales: sides of the scales, coarse to fine; the last is the grid.
        semantic_dim: channels of the semantic codes.
        pixel_dim: channels of the pixel codes; 0 leaves the semantic codebook alone, whose codes the pixel decoder reads.
        codebook_size: K.
        pixel_weight: of the pixel distance in the search, where the semantic one weighs 1.
        commitment_weight: beta.
        update: how codebooks learn, "ema" or "gradient".
        decay: of the moving averages.
        scale_dropout: probability that a training batch skips a scale.
        dead_code_threshold: see SharedIndexQuantizer.
        kmeans_init: whether the first training batch places the codes.
        widths: of the pixel encoder, full resolution first.
        teacher_dim: width of what the semantic decoder is compared with.
        tower: the semantic encoder; None is the demo's small networks, which read nothing of what follows.
        decoder_widths: of the pixel decoder, full resolution first.
        encoder_blocks: residual blocks a level.
        decoder_blocks: residual blocks a level.
        latent: channels of the pixel networks next to the codes.
        decoder_grid: side of the grid that the semantic decoder's positions were learned on.
        decoder_depth: blocks of the semantic decoder.
        decoder_heads: heads of its attention.
    """

    image_size: int | tuple[int, int] = 64
    scales: tuple = (1, 2, 4, 8, 16)
    semantic_dim: int = 24
    pixel_dim: int = 8
    codebook_size: int = 2048
    pixel_weight: float = 4.0
    commitment_weight: float = 0.25
    update: str = "ema"
    decay: float = 0.98
    scale_dropout: float = 0.1
    dead_code_threshold: float = 0.3
    widths: tuple[int, ...] = (32, 64, 128)
    teacher_dim: int = 128
    kmeans_init: bool = False
    tower: Tower | None = None
    decoder_widths: tuple[int, ...] = ()
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    latent: int = 256
    decoder_grid: int = 14
    decoder_depth: int = 3
    decoder_heads: int = 12


PUBLISHED = Config(
    image_size=224,
    scales=(1, 2, 4, 6, 8, 10, 12, 14),
    semantic_dim=32,
    codebook_size=32768,
    pixel_weight=1.0,
    update="gradient",
    dead_code_threshold=0.0,
    widths=(128, 128, 256, 256, 512),
    teacher_dim=512,
    tower=Tower("clip", width=768, depth=12, heads=12, hidden=3072, patch=16, grid=14),
    decoder_widths=(128, 128, 256, 256, 512),
)
ENHANCED = replace(PUBLISHED, decoder_widths=(256, 256, 512, 512, 1024), decoder_blocks=5)
PRESETS = {
    "tokenflow-tiny": Config(),
    "tokenflow-b": PUBLISHED,
    "tokenflow-b-enhanced": ENHANCED,
    "tokenflow-b-256": replace(ENHANCED, image_size=256, scales=(*PUBLISHED.scales, 16)),
    # The authors' code has these nine scales; the paper's table has a tenth, 3, for this model alone.
    "tokenflow-l": replace(
        PUBLISHED,
        image_size=256,
        scales=(*PUBLISHED.scales, 16),
        teacher_dim=1152,
        tower=Tower("vitamin", width=1152, depth=32, heads=16, hidden=2304, patch=16, grid=16, stages=(192, 384)),
        decoder_grid=16,
    ),
    "tokenflow-xl": replace(
        PUBLISHED,
        image_size=384,
        scales=(*range(1, 11), 12, 14, 17, 22, 27),
        teacher_dim=1152,
        tower=Tower("siglip", width=1152, depth=26, heads=16, hidden=4304, patch=14, grid=27),
        decoder_grid=27,
    ),
}


class Output(NamedTuple):
    """What training needs: images [B, 3, H, W], semantic [B, teacher_dim, h, w], indices [B, L], loss (commitment, 0-dim)."""

    images: Tensor
    semantic: Tensor
    indices: Tensor
    loss: Tensor


class TokenFlow(MultiScaleTokenizer):
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
    assumed = ("image_size", "scales", "decoder_heads")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = self.config
        if c.pixel_dim < 0:
            raise ValueError(f"TokenFlow: pixel_dim: wanted 0 or more, got {c.pixel_dim}")
        if c.tower is None and (not isinstance(c.widths, (tuple, list)) or len(c.widths) != 3):
            raise ValueError(f"TokenFlow: widths: wanted three numbers, got {c.widths}")
        read = c.pixel_dim or c.semantic_dim
        if c.tower is None:
            side, (_, b, w) = c.scales[-1], c.widths
            if c.pixel_dim:
                self.pixel_encoder = tiny.pixel_encoder(c.pixel_dim, c.widths, side)
            self.pixel_decoder = tiny.pixel_decoder(read, c.widths, side)
            self.semantic_encoder = tiny.SemanticEncoder(c.semantic_dim, (b, w), side)
            self.semantic_decoder = tiny.SemanticDecoder(c.semantic_dim, w, side, c.teacher_dim)
        else:
            pixel = {"latent": c.latent}
            if c.pixel_dim:
                self.pixel_encoder = conv.Encoder(c.pixel_dim, c.widths, blocks=c.encoder_blocks, **pixel)
            self.pixel_decoder = conv.Decoder(read, c.decoder_widths, blocks=c.decoder_blocks, **pixel)
            self.semantic_encoder = SemanticEncoder(c.tower, c.semantic_dim)
            self.semantic_decoder = SemanticDecoder(
                c.semantic_dim,
                c.tower.width,
                c.teacher_dim,
                depth=c.decoder_depth,
                heads=c.decoder_heads,
                grid=c.decoder_grid,
            )
        self.quantizer = self.make_quantizer()

    @classmethod
    def recognise(cls, state: Mapping[str, Tensor]) -> Config:
        return tokenflow_keys.recognise(state, PUBLISHED)

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], config: Config) -> checkpoint.Converted:
        return tokenflow_keys.convert(state, config)

    def load_tower(self, path: str | Path) -> None:
        """Start the semantic encoder from a CLIP or SigLIP, as training from nothing does; its head and all else stay.

        Args:
            path: a file of weights with the names of transformers, OpenAI's CLIP or open_clip; a text tower in it is left out.

        Raises:
            ValueError: a model without such a tower, or weights of another.
        """
        if self.config.tower is None:
            raise ValueError("load_tower: wanted a model with a published tower, got the demo's small networks")
        state, _ = checkpoint.read(path, self.places)
        converted = tokenflow_keys.tower_start(state, self.config.tower)
        checkpoint.fit(converted, self.semantic_encoder.tower, path, caller="load_tower")

    def make_quantizer(self) -> MultiScaleQuantizer:
        c = self.config
        if "quantizer" in self._modules:
            codes = self.quantizer.quantizer
        else:
            halves = 2 if c.pixel_dim else 1
            codes = SharedIndexQuantizer(
                (c.semantic_dim, c.pixel_dim)[:halves],
                c.codebook_size,
                weights=(1.0, c.pixel_weight)[:halves],
                update=c.update,
                decay=c.decay,
                commitment_weight=c.commitment_weight,
                kmeans_init=c.kmeans_init,
                dead_code_threshold=c.dead_code_threshold,
            )
        return MultiScaleQuantizer(codes, c.scales, scale_dropout=c.scale_dropout)

    @classmethod
    def grid_of(cls, config: Config, image_size: tuple[int, int]) -> tuple[int, int]:
        if config.tower is None:
            if type(config.scales[-1]) is not int or config.scales[-1] % 2:
                raise ValueError(f"TokenFlow: scales: wanted an even side at the end, got {config.scales}")
            side = 4 * config.scales[-1]
            if image_size != (side, side):
                raise ValueError(f"TokenFlow: image_size: wanted {side}, the size of this model, got {image_size}")
            return (config.scales[-1],) * 2
        patch = config.tower.patch
        if min(image_size) < patch or (config.tower.kind == "vitamin" and any(n % patch for n in image_size)):
            wanted = f"multiples of {patch}" if config.tower.kind == "vitamin" else f"at least {patch} x {patch}"
            raise ValueError(f"TokenFlow: image_size: wanted {wanted}, got {image_size}")
        return image_size[0] // patch, image_size[1] // patch

    def summary(self) -> dict[str, str]:
        tower, rows = self.config.tower, super().summary()
        if tower is not None:
            rows["tower"] = f"{tower.kind}, {tower.depth} blocks of {tower.width} channels in {tower.heads} heads"
        return rows

    def encode_features(self, images: Tensor) -> Tensor:
        """Features before the quantizer, semantic channels first: [B, 32, 16, 16] from images [B, 3, 64, 64] in [-1, 1].

        Raises:
            TypeError: images are not floating point.
            ValueError: another shape.
        """
        images = self.checked(images)
        if len(images) == 0:
            return self.empty_features(images, self.config.semantic_dim + self.config.pixel_dim)
        semantic = self.semantic_encoder(images)
        if not self.config.pixel_dim:
            return semantic
        return torch.cat([semantic, self.pixel_encoder(self._as_pixels(images))], 1)

    def decode_features(self, features: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] from accumulated features [B, 32, 16, 16]; only the pixel half is read, if there is one."""
        semantic, pixel = self._halves(features)
        pixel = (pixel if self.config.pixel_dim else semantic).to(self.dtype)
        if len(pixel) == 0:
            return pixel.new_zeros(0, 3, *self.image_size)
        images = self.pixel_decoder(pixel.contiguous(memory_format=torch.channels_last))
        return images if images.shape[2:] == self.image_size else F.interpolate(images, self.image_size, mode="bicubic")

    def decode_semantic(self, features: Tensor) -> Tensor:
        """What the teacher would say, [B, teacher_dim, 8, 8], from accumulated features [B, 32, 16, 16]."""
        return self.semantic_decoder(self._halves(features)[0].to(self.dtype))

    def forward(self, images: Tensor) -> Output:
        """Everything that training needs, from images [B, 3, 64, 64] in [-1, 1]."""
        quantized, indices, loss = self.quantize(self.encode_features(images))
        return Output(self.decode_features(quantized), self.decode_semantic(quantized), indices, loss)

    def _as_pixels(self, images: Tensor) -> Tensor:
        """The images at the size whose pixel features have the cells of the grid: a patch need not be 2^levels wide."""
        if self.config.tower is None:
            return images
        size = tuple(n * 2 ** (len(self.config.widths) - 1) for n in self.grid)
        return images if images.shape[2:] == size else F.interpolate(images, size, mode="bicubic")

    def _halves(self, features: Tensor) -> tuple[Tensor, Tensor]:
        want = self.config.semantic_dim + self.config.pixel_dim
        if features.dim() != 4 or features.shape[1] != want:
            raise ValueError(f"decode_features: features: wanted [B, {want}, h, w], got {list(features.shape)}")
        return features.split([self.config.semantic_dim, self.config.pixel_dim], 1)
