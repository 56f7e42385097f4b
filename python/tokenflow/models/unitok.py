"""UniTok: several small codebooks a token, for pictures and their meaning alike.

    z = quant_proj(encoder(x)) [B, L, 64]  ->  8 ids a token, one in each slice of 8 channels  ->  q
    x' = decoder(post_quant_proj(q)),   image feature = projection(LayerNorm(mean over tokens of post_quant_proj(q)))

The image feature is compared with a text tower's, as in CLIP. No position embedding anywhere: pictures of any sides that are
multiples of 16. The quantizer works in float32 whatever the autocast type, so that a bfloat16 model has one definition of its
tokens: those of its own features.

Source: Ma et al., "UniTok: A Unified Tokenizer for Visual Generation and Understanding", arXiv 2502.20321.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.models.projection import AttnProjection
from tokenflow.models.text import TextTower
from tokenflow.models.vitamin import EPS, PATCH, ViTamin, ViTaminDecoder
from tokenflow_ext.quantize import VectorQuantizer


@dataclass(frozen=True)
class Config:
    """Sizes of a UniTok model; the defaults are the published large one.

    Head counts and `projection_causal` leave no trace in a checkpoint's shapes, so they stand here: `heads` of encoder and
    decoder, `projection_heads` of both projections (published: dim / code_dim, heads as wide as a code vector; full attention
    since April 2025, causal before), `text_heads`. `projection` is "attention" or "linear". `code_dim` channels fall into
    `groups` codebooks of `codebook_size` codes.
    """

    image_size: int = 256
    widths: tuple[int, int] = (160, 320)
    dim: int = 1024
    depth: int = 31
    heads: int = 16
    groups: int = 8
    codebook_size: int = 4096
    code_dim: int = 64
    projection: str = "attention"
    projection_heads: int = 16
    projection_causal: bool = False
    embed_dim: int = 768
    text_width: int = 768
    text_heads: int = 12
    text_depth: int = 12
    context: int = 77
    vocabulary: int = 49408
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    drop_path: float = 0.1


PRESETS = {
    "unitok-l": Config(),
    "unitok-b": Config(widths=(128, 256), dim=768, depth=14, heads=12, projection_heads=12),
}


class Output(NamedTuple):
    """What training needs: images [R, 3, H, W] (not clamped), indices [B, G, L], loss (the quantizer's, 0-dim), unit
    image_features [B, E], unit text_features [T, E] or None, logit_scale (0-dim, already exponentiated)."""

    images: Tensor
    indices: Tensor
    loss: Tensor
    image_features: Tensor
    text_features: Tensor | None
    logit_scale: Tensor


class UniTok(nn.Module):
    """A tokenizer with G independent codebooks and CLIP's two feature spaces.

    Args:
        config: the sizes.

    Example:
        >>> model = UniTok(Config(widths=(8, 16), dim=32, depth=1, heads=2, groups=2, codebook_size=16, code_dim=8,
        ...                       projection_heads=4, embed_dim=24, text_width=16, text_heads=2, text_depth=1)).eval()
        >>> images = torch.zeros(1, 3, 64, 64)
        >>> indices = model.encode(images)
        >>> indices.shape, model.decode(indices).shape, model.features(images).shape, model.encode_image(images).shape
        (torch.Size([1, 2, 16]), torch.Size([1, 3, 64, 64]), torch.Size([1, 8, 4, 4]), torch.Size([1, 24]))
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        tower = {"depth": c.depth, "heads": c.heads, "drop_path": c.drop_path}
        self.encoder = ViTamin(c.widths, c.dim, **tower)
        self.quant_proj = self._projection(c.dim, c.code_dim)
        self.quantizer = VectorQuantizer(
            c.code_dim, c.codebook_size, groups=c.groups, commitment_weight=c.commitment_weight,
            entropy_weight=c.entropy_weight, entropy_temperature=c.entropy_temperature, entropy_eps=1e-7,
        )  # fmt: skip
        self.post_quant_proj = self._projection(c.code_dim, c.dim)
        self.decoder = ViTaminDecoder(c.widths, c.dim, **tower)
        self.text_encoder = TextTower(
            width=c.text_width, heads=c.text_heads, depth=c.text_depth, out=c.embed_dim, context=c.context,
            vocabulary=c.vocabulary,
        )  # fmt: skip
        self.fc_norm = nn.LayerNorm(c.dim, eps=EPS)
        self.projection = nn.Linear(c.dim, c.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def _projection(self, dim: int, out: int) -> nn.Module:
        c = self.config
        if c.projection == "linear":
            return nn.Linear(dim, out)
        return AttnProjection(dim, out, heads=c.projection_heads, causal=c.projection_causal)

    def encode_features(self, images: Tensor) -> Tensor:
        """What the quantizer reads, [B, L, code_dim], of images [B, 3, H, W] in [-1, 1], L = H/16 * W/16.

        Raises:
            TypeError: images are not floating point.
            ValueError: another shape, or sides that are no multiples of 16.
        """
        check_images(images)
        return self.quant_proj(self.encoder(images))

    def decode_features(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images [B, 3, 16 h, 16 w], not clamped, of expanded tokens [B, L, dim] on a grid (h, w), a square by default."""
        return self.decoder(tokens, self._grid(tokens.shape[1], grid))

    def forward(self, images: Tensor, text: Tensor | None = None, *, reconstructed: int | None = None) -> Output:
        """Everything that training needs.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            text: token ids [T, context] of captions.
            reconstructed: R, how many of the images are decoded, the first ones; all by default. Published training
                contrasts more images than it reconstructs.
        """
        features = self.encode_features(images)
        with torch.autocast(images.device.type, enabled=False):
            quantized, indices, loss = self.quantizer(features.float())
        tokens = self.post_quant_proj(quantized.to(features.dtype))
        decoded = self.decode_features(tokens[:reconstructed], grid_of(images))
        return Output(
            decoded, indices.movedim(-1, 1), loss, F.normalize(self._image_vectors(tokens), dim=-1),
            None if text is None else self.encode_text(text, normalize=True), self.logit_scale.exp(),
        )  # fmt: skip

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids [B, G, L], each below `codebook_size`, of images [B, 3, H, W] in [-1, 1]; changes no state."""
        features = self.encode_features(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.quantizer.encode(features.float()).movedim(-1, 1).contiguous()

    @torch.no_grad()
    def decode(self, indices: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images [B, 3, 16 h, 16 w] in [-1, 1] from token ids [B, G, L] on a grid (h, w), a square by default."""
        tokens = self.post_quant_proj(self._codes(indices))
        return self.decode_features(tokens, grid).float().clamp(-1, 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The codes of images as a map [B, code_dim, H/16, W/16]: what a language model reads."""
        return self._codes(self.encode(images)).transpose(1, 2).unflatten(2, grid_of(images))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images)), on the images' own grid."""
        return self.decode(self.encode(images), grid_of(images))

    @torch.no_grad()
    def encode_image(self, images: Tensor, *, normalize: bool = False) -> Tensor:
        """Vectors [B, embed_dim] of images, through their token ids; comparable with `encode_text` of captions."""
        vectors = self._image_vectors(self.post_quant_proj(self._codes(self.encode(images))))
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def encode_text(self, ids: Tensor, *, normalize: bool = False) -> Tensor:
        """Vectors [T, embed_dim] of captions' token ids [T, context]; see `tokenflow.models.text.TextTokenizer`."""
        vectors = self.text_encoder(ids)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Recompute the blocks of encoder and decoder in backward instead of keeping what they computed."""
        self.encoder.blocks.checkpointing = self.decoder.blocks.checkpointing = enable

    def _image_vectors(self, tokens: Tensor) -> Tensor:
        return self.projection(self.fc_norm(tokens.mean(1)))

    def _codes(self, indices: Tensor) -> Tensor:
        """Code vectors [B, L, code_dim] of ids [B, G, L], in the type of the layers that read them."""
        groups = self.config.groups
        if indices.dim() != 3 or indices.shape[1] != groups:
            raise ValueError(f"decode: indices: wanted [B, {groups}, L], got {list(indices.shape)}")
        ids = indices.movedim(1, -1)
        codes = self.quantizer.decode(ids if groups > 1 else ids.squeeze(-1))
        return codes.to(self.fc_norm.weight.dtype)

    def _grid(self, length: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        if grid is None:
            side = math.isqrt(length)
            if side * side != length:
                raise ValueError(f"decode: grid: wanted (h, w) where {length} tokens are no square, got None")
            return side, side
        h, w = grid
        if h * w != length:
            raise ValueError(f"decode: grid: wanted (h, w) with h * w = {length}, got {tuple(grid)}")
        return h, w


def grid_of(images: Tensor) -> tuple[int, int]:
    """(H/16, W/16) of images [B, 3, H, W]."""
    return images.shape[2] // PATCH, images.shape[3] // PATCH


def check_images(images: Tensor) -> None:
    """Raises a sentence where images are not floating point; the encoder checks their shape."""
    if not images.is_floating_point():
        raise TypeError(f"encode: images: wanted floating point values in [-1, 1], got {images.dtype}")
