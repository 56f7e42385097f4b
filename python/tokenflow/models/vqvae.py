"""VAR's multi-scale VQVAE: the tokenizer of next-scale prediction.

    f = encoder(x);   r = f;   for each scale: f_hat += phi(up(code(down(r)))), r -= the same;   x' = decoder(f_hat)

Source: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", 2404.02905.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tokenflow.models import checkpoint, conv
from tokenflow.models.multiscale import MultiScaleTokenizer
from tokenflow_ext.quantize import MultiScaleQuantizer, VectorQuantizer

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@dataclass(frozen=True)
class Config:
    """Sizes of a VQVAE.

    Attributes:
        image_size: side of the images, or height and width: multiples of a cell's side.
        scales: sides of the scales, coarse to fine; the last is the grid.
        dim: channels of the codes.
        codebook_size: K.
        commitment_weight: beta.
        widths: of encoder and decoder, full resolution first; each level but the first halves the map.
        encoder_blocks: residual blocks a level.
        decoder_blocks: residual blocks a level.
        phis: number of convolutions phi that the scales share.
        phi_ratio: share of the convolution in phi(h) = (1 - ratio) h + ratio conv(h).
    """

    image_size: int | tuple[int, int] = 256
    scales: tuple = SCALES
    dim: int = 32
    codebook_size: int = 4096
    commitment_weight: float = 0.25
    widths: tuple[int, ...] = (160, 160, 320, 320, 640)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    phis: int = 4
    phi_ratio: float = 0.5


PRESETS = {"var-vqvae": Config()}

RULES = [
    (r"\.down\.(\d+)\.", r".levels.\1."),
    (r"\.block\.(\d+)\.", r".residuals.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(?:up|down)sample\.conv\.", ".resample."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".out."),
    (r"\.mid\.block_1\.", ".middle.0."),
    (r"\.mid\.attn_1\.", ".middle.1."),
    (r"\.mid\.block_2\.", ".middle.2."),
    (r"^quant_conv\.", "encoder.project."),
    (r"^post_quant_conv\.", "decoder.project."),
    (r"^quantize\.embedding\.weight$", "quantizer.quantizer.codebook.table_0"),
    (r"^quantize\.quant_resi\.qresi_ls\.(\d+)\.(weight|bias)$", r"quantizer.phi_\2[\1]"),
]
DROPS = [(r"quantize\.ema_vocab_hit_SV", "how often training chose each code")]


def phi_assignment(phis: int, scales: int) -> list[int]:
    """Which of the shared convolutions serves each scale: the nearest of evenly spaced ticks in [0, 1].

    Two of the ten published scales lie midway between ticks. The rounding of exactly these float64 expressions decides them.

    Example:
        >>> phi_assignment(4, 10)
        [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    """
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(edge, 1 - edge, phis)
    return [int(np.argmin(np.abs(ticks - (s / (scales - 1) if scales > 1 else 0)))) for s in range(scales)]


class VQVAE(MultiScaleTokenizer):
    """VAR's tokenizer.

    Args:
        config: the sizes.

    Example:
        >>> config = Config(image_size=32, scales=(1, 2, 4), dim=4, codebook_size=16, widths=(8, 8, 8, 16))
        >>> model = VQVAE(config).eval()
        >>> indices = model.encode(torch.zeros(2, 3, 32, 32))
        >>> indices.shape, model.decode(indices[:, :5]).shape
        (torch.Size([2, 21]), torch.Size([2, 3, 32, 32]))
    """

    kind = "vqvae"
    config_type = Config
    presets = PRESETS
    assumed = ("image_size", "scales", "phi_ratio")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, shared = self.config, {"latent": config.dim, "project": 3}
        self.encoder = conv.Encoder(c.dim, c.widths, blocks=c.encoder_blocks, **shared)
        self.decoder = conv.Decoder(c.dim, c.widths, blocks=c.decoder_blocks, **shared)
        self.quantizer = self.make_quantizer()

    def make_quantizer(self) -> MultiScaleQuantizer:
        c = self.config
        if "quantizer" in self._modules:
            codes, weight, bias = self.quantizer.quantizer, self.quantizer.phi_weight, self.quantizer.phi_bias
        else:
            codes = VectorQuantizer(c.dim, c.codebook_size, metric="l2", commitment_weight=c.commitment_weight)
            convolutions = [nn.Conv2d(c.dim, c.dim, 3) for _ in range(c.phis)]
            weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in convolutions]))
            bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in convolutions]))
        phi = (weight, bias, c.phi_ratio, phi_assignment(c.phis, len(c.scales)))
        return MultiScaleQuantizer(codes, c.scales, phi=phi, loss_on="accumulated")

    @classmethod
    def grid_of(cls, config: Config, image_size: tuple[int, int]) -> tuple[int, int]:
        cell = 2 ** (len(config.widths) - 1)
        if min(image_size) < cell or image_size[0] % cell or image_size[1] % cell:
            raise ValueError(f"VQVAE: image_size: wanted multiples of {cell}, got {image_size}")
        return image_size[0] // cell, image_size[1] // cell

    @classmethod
    def recognise(cls, state: Mapping[str, Tensor]) -> Config:
        try:
            codes, dim = state["quantize.embedding.weight"].shape
            levels = checkpoint.count(state, r"encoder\.down\.(\d+)\.")
            phis = checkpoint.count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
            widths = tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels))
            state["quantize.quant_resi.qresi_ls.0.weight"]
        except KeyError as error:
            raise ValueError(
                f"from_checkpoint: path: wanted the weights of VAR's VQVAE, got {len(state)} tensors without {error.args[0]}"
            ) from error
        return Config(
            dim=dim,
            codebook_size=codes,
            widths=widths,
            encoder_blocks=checkpoint.count(state, r"encoder\.down\.0\.block\.(\d+)\."),
            decoder_blocks=checkpoint.count(state, r"decoder\.up\.0\.block\.(\d+)\."),
            phis=phis,
        )

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], config: Config) -> checkpoint.Converted:
        last = len(config.widths) - 1
        # The authors count the decoder's levels from full resolution, we in the order of their work.
        up = (r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.levels.{last - int(m[1])}.")
        stacked = {name: value[None] if re.search(r"\.qresi_ls\.", name) else value for name, value in state.items()}
        return checkpoint.rename(stacked, [up, *RULES], DROPS)

    def encode_features(self, images: Tensor) -> Tensor:
        """Features before the quantizer, [B, dim, h, w] from images [B, 3, H, W] in [-1, 1]."""
        images = self.checked(images)
        return self.encoder(images) if len(images) else self.empty_features(images, self.config.dim)

    def decode_features(self, features: Tensor) -> Tensor:
        """Images [B, 3, H, W], not clamped, from accumulated features [B, dim, h, w]."""
        if features.dim() != 4 or features.shape[1] != self.config.dim:
            raise ValueError(
                f"decode_features: features: wanted [B, {self.config.dim}, h, w], got {list(features.shape)}"
            )
        if len(features) == 0:
            return features.new_zeros(0, 3, *self.image_size)
        return self.decoder(features.to(self.dtype).contiguous(memory_format=torch.channels_last))
