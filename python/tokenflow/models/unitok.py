"""UniTok: several small codebooks a token, for pictures and their meaning alike.

    z = quant_proj(encoder(x)) [B, 64, h, w]  ->  8 ids a token, one in each slice of 8 channels  ->  q
    x' = decoder(post_quant_proj(q)),   image vector = projection(LayerNorm(mean over tokens of post_quant_proj(q)))

The image vector is compared with a text tower's, as in CLIP. No position embedding anywhere: pictures of any sides that are
multiples of 16.

Source: Ma et al., "UniTok: A Unified Tokenizer for Visual Generation and Understanding", arXiv 2502.20321.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tokenflow.models import checkpoint, unitok_checkpoint
from tokenflow.models.image_processor import ImageProcessor
from tokenflow.models.precision import full, in_full
from tokenflow.models.projection import AttnProjection
from tokenflow.models.text import TextTower
from tokenflow.models.tokenizer import Tokenizer, check_floating
from tokenflow.models.vitamin import EPS, PATCH, ViTamin, ViTaminDecoder
from tokenflow_ext.quantize import VectorQuantizer

PROJECTIONS = ("attention", "linear")


@dataclass(frozen=True)
class Config:
    """Sizes of a UniTok model; the defaults are the published large one.

    Head counts and `projection_causal` leave no trace in a checkpoint's shapes, so they stand here: `heads` of encoder and
    decoder, `projection_heads` of both projections (published: dim / code_dim, so that heads are as wide as a token's code;
    full attention since April 2025, causal before), `text_heads`. `projection` is "attention" or "linear". A token's `code_dim`
    channels fall into `groups` codebooks of `codebook_size` codes. `image_size` is what an image processor makes; the
    networks take other sizes. `drop_path` is the rate of the last block of encoder and decoder in training.
    """

    image_size: int | tuple[int, int] = 256
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
    image_vectors [B, E], unit text_vectors [T, E] or None, logit_scale (0-dim, exponentiated)."""

    images: Tensor
    indices: Tensor
    loss: Tensor
    image_vectors: Tensor
    text_vectors: Tensor | None
    logit_scale: Tensor


class UniTok(Tokenizer):
    """A tokenizer with G independent codebooks and CLIP's two vectors.

    Args:
        config: the sizes.

    Example:
        >>> config = Config(widths=(8, 16), dim=32, depth=1, heads=2, groups=2, codebook_size=16, code_dim=8,
        ...                 projection_heads=4, embed_dim=24, text_width=16, text_heads=2, text_depth=1, vocabulary=99)
        >>> model, images = UniTok(config).eval(), torch.zeros(1, 3, 64, 64)
        >>> indices = model.encode(images)
        >>> indices.shape, model.decode(indices).shape, model.features(images).shape, model.encode_image(images).shape
        (torch.Size([1, 2, 16]), torch.Size([1, 3, 64, 64]), torch.Size([1, 8, 4, 4]), torch.Size([1, 24]))
    """

    kind = "unitok"
    config_type = Config
    presets = PRESETS
    places = ("trainer.unitok", "unitok", "ema", "model", "state_dict")
    assumed = ("image_size", "heads", "projection_heads", "projection_causal", "text_heads")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.projection not in PROJECTIONS:
            raise ValueError(f"UniTok: projection: wanted one of {', '.join(PROJECTIONS)}, got {c.projection!r}")
        if any(not isinstance(side, int) or side < PATCH or side % PATCH for side in self.image_size):
            raise ValueError(f"UniTok: image_size: wanted multiples of {PATCH}, got {c.image_size!r}")
        tower = {"depth": c.depth, "heads": c.heads, "drop_path": c.drop_path}
        self.encoder = ViTamin(c.widths, c.dim, **tower)
        self.quant_proj = self._projection(c.dim, c.code_dim)
        self.quantizer = VectorQuantizer(
            c.code_dim, c.codebook_size, groups=c.groups, commitment_weight=c.commitment_weight, channel_dim=1,
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
        self._initialise()

    def _projection(self, dim: int, out: int) -> nn.Module:
        c = self.config
        if c.projection == "linear":
            return nn.Linear(dim, out)
        return AttnProjection(dim, out, heads=c.projection_heads, causal=c.projection_causal)

    @torch.no_grad()
    def _initialise(self) -> None:
        """UniTok's: small codes, so that they turn fast at first; narrow linear layers; convolutions of the decoder at half gain.

        The encoder's convolutions keep ViTamin's own initialisation, which is by fan-out (from memory).
        """
        bound = (self.config.code_dim // self.config.groups) ** -0.5 / 36
        for table in self.quantizer.codebooks():
            nn.init.uniform_(table, -bound, bound)
        for part in (self.encoder, self.decoder, self.quant_proj, self.post_quant_proj, self.projection):
            for layer in part.modules():
                if not isinstance(layer, nn.Linear | nn.Conv2d):
                    continue
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                elif part is self.encoder:
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.xavier_normal_(layer.weight, gain=0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def encode_features(self, images: Tensor) -> Tensor:
        """What the quantizer reads, [B, code_dim, H/16, W/16] in float32 (float64 for float64), of images [B, 3, H, W] in [-1, 1].

        Raises:
            TypeError: images are not floating point.
            ValueError: another shape, or sides that are no multiples of 16.
        """
        features = in_full(self.quant_proj, self.encoder(self.checked(images)))
        return features.transpose(1, 2).unflatten(2, grid_of(images))

    def expand(self, features: Tensor) -> Tensor:
        """Tokens [B, h * w, dim], which the decoder and the image vector read, of quantized features [B, code_dim, h, w]."""
        want = self.config.code_dim
        if features.dim() != 4 or features.shape[1] != want:
            raise ValueError(f"decode_features: features: wanted [B, {want}, h, w], got {list(features.shape)}")
        return self.post_quant_proj(features.to(self.dtype).flatten(2).transpose(1, 2))

    def decode_features(self, features: Tensor) -> Tensor:
        """Images [B, 3, 16 h, 16 w], not clamped, of quantized features [B, code_dim, h, w]."""
        return self.decoder(self.expand(features), tuple(features.shape[2:]))

    def forward(self, images: Tensor, text: Tensor | None = None, *, reconstructed: int | None = None) -> Output:
        """Everything that training needs.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            text: token ids [T, context] of captions.
            reconstructed: R, how many of the images are decoded, the first ones; all by default. Published training
                contrasts more images than it reconstructs.
        """
        quantized, indices, loss = self.quantize(self.encode_features(images))
        tokens = self.expand(quantized)
        vectors = F.normalize(self._image_vectors(tokens), dim=-1)
        text_vectors = None if text is None else self.encode_text(text, normalize=True)
        decoded = self.decoder(tokens[:reconstructed], grid_of(images))
        return Output(decoded, self._by_group(indices), loss, vectors, text_vectors, self.logit_scale.exp())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids [B, G, L], each below `codebook_size`, of images [B, 3, H, W] in [-1, 1]; L = H/16 * W/16, row major."""
        return self._by_group(super().encode(images))

    def codes(self, indices: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The quantized features [B, code_dim, h, w] of token ids [B, G, L], see `decode`."""
        groups = self.config.groups
        if indices.dim() != 3 or indices.shape[1] != groups:
            raise ValueError(f"decode: indices: wanted [B, {groups}, L], got {list(indices.shape)}")
        length = indices.shape[2]
        side, own = math.isqrt(length), tuple(side // PATCH for side in self.image_size)
        height, width = grid or (own if math.prod(own) == length else (side, side))
        if not all(isinstance(n, int) and n > 0 for n in (height, width)) or height * width != length:
            raise ValueError(f"decode: grid: wanted (h, w) with h * w = {length}, got {grid}")
        ids = indices.transpose(1, 2).unflatten(1, (height, width))
        return self.quantizer.decode(ids if groups > 1 else ids.squeeze(-1))

    def split(self, indices: Tensor) -> list[Tensor]:
        """Token ids [B, G, L] as one row [B, L] a group."""
        return list(indices.unbind(1))

    @torch.no_grad()
    def decode(self, indices: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images [B, 3, 16 h, 16 w] in [-1, 1] from token ids [B, G, L].

        Args:
            indices: as `encode` gives them.
            grid: (h, w) with h * w = L; by default that of `config.image_size` where it fits, else a square.

        Raises:
            ValueError: another shape, ids that are no codes, or a grid that does not fit.
        """
        return full(self.decode_features(self.codes(indices, grid))).clamp(-1, 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The codes of images, [B, code_dim, H/16, W/16]: what a language model reads, one token a position."""
        return self.codes(self.encode(images), grid_of(images))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images)), on the images' own grid."""
        return self.decode(self.encode(images), grid_of(images))

    @torch.no_grad()
    def encode_image(self, images: Tensor, *, normalize: bool = False) -> Tensor:
        """Vectors [B, embed_dim] of images, through their token ids; for training see `forward`."""
        return self.image_vectors(self.features(images), normalize=normalize)

    @torch.no_grad()
    def image_vectors(self, codes: Tensor, *, normalize: bool = False) -> Tensor:
        """Vectors [B, embed_dim] of quantized features [B, code_dim, h, w], as `codes` gives them."""
        vectors = self._image_vectors(self.expand(codes))
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def encode_text(self, ids: Tensor, *, normalize: bool = False) -> Tensor:
        """Vectors [T, embed_dim] of captions' token ids [T, context], see `tokenflow.models.text.TextTokenizer`."""
        vectors = self.text_encoder(ids)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Recompute the blocks of encoder and decoder in backward instead of keeping what they computed."""
        self.encoder.blocks.checkpointing = self.decoder.blocks.checkpointing = enable

    @classmethod
    def recognise(cls, state: Mapping[str, Tensor]) -> Config:
        """The config of a released model, from names and shapes; what they do not tell (`assumed`) as published."""
        return Config(**unitok_checkpoint.sizes(state))

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], config: Config) -> checkpoint.Converted:
        """Released weights under our names."""
        return unitok_checkpoint.convert(state)

    def checked(self, images: Tensor) -> Tensor:
        """Images in the model's own type, channels last.

        Raises:
            TypeError: images are not floating point.
            ValueError: another shape, or sides that are no multiples of 16.
        """
        check_floating(images)
        if images.dim() != 4 or images.shape[1] != 3 or any(side < PATCH or side % PATCH for side in images.shape[2:]):
            raise ValueError(
                f"encode: images: wanted [B, 3, H, W] with sides that are multiples of {PATCH}, got {list(images.shape)}"
            )
        return images.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def image_processor(self) -> ImageProcessor:
        """UniTok's own: bilinear to 9/8 of the size (the shorter side to 288 for 256), then the middle."""
        cover = tuple(side * 9 // 8 for side in self.image_size)
        return ImageProcessor(self.image_size, cover=cover, resample=Image.Resampling.BILINEAR)

    def summary(self) -> dict[str, str]:
        """Rows about the model for a reader."""
        c = self.config
        tokens = math.prod(side // PATCH for side in self.image_size)
        return {
            **super().summary(),
            "tokens": f"{tokens} an image, each of {c.groups} ids below {c.codebook_size}, {c.code_dim} channels",
            "layers": f"{c.depth} of {c.dim} channels, {c.projection} projections",
            "text": f"{c.text_depth} layers of {c.text_width}, {c.vocabulary} words, {c.context} a caption, vectors of {c.embed_dim}",
        }

    def _image_vectors(self, tokens: Tensor) -> Tensor:
        return self.projection(self.fc_norm(tokens.mean(1)))

    def _by_group(self, indices: Tensor) -> Tensor:
        """[B, G, L] of the quantizer's [B, h, w, G], or [B, h, w] of one group."""
        batch, height, width = indices.shape[:3]
        return indices.reshape(batch, height * width, self.config.groups).transpose(1, 2).contiguous()


def grid_of(images: Tensor) -> tuple[int, int]:
    """(H/16, W/16) of images [B, 3, H, W]."""
    return images.shape[2] // PATCH, images.shape[3] // PATCH
