"""The small networks around the quantizer, for 64 x 64 pictures on a 16 x 16 grid: minutes on two CPU cores.

Every residual branch ends in a zero-initialised layer, so each network starts near the identity. Attention writes its softmax
out: the fused CPU kernel's backward is slower at 64 tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The layer with weight and bias zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """x + conv3(silu(norm(conv3(silu(norm(x))))))  on [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Attention(nn.Module):
    """A pre-norm transformer block over the cells of a map [B, C, side, side], with learned positions.

    Args:
        channels: C.
        side: side of the map.
        heads: number of heads.
        expansion: hidden width of the MLP over C.
    """

    def __init__(self, channels: int, side: int, *, heads: int = 4, expansion: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(0.02 * torch.randn(1, side * side, channels))
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.mlp = nn.Sequential(
            nn.Linear(channels, expansion * channels), nn.GELU(), zeroed(nn.Linear(expansion * channels, channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows = x.flatten(2).transpose(1, 2)
        normed = self.norm1(rows + self.position)
        q, k, v = self.qkv(normed).view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5).softmax(-1).to(v.dtype)
        rows = rows + self.out((weights @ v).transpose(1, 2).reshape(b, h * w, c))
        rows = rows + self.mlp(self.norm2(rows))
        return rows.transpose(1, 2).reshape(b, c, h, w)


class Context(nn.Module):
    """x + upsample(attention(residual(downsample(x)))): half the resolution sees the whole picture. [B, C, 2s, 2s]."""

    def __init__(self, channels: int, wide: int, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 3, stride=2, padding=1),
            Residual(wide),
            Attention(wide, side),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(wide, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def pixel_encoder(dim: int, widths: tuple[int, int, int], side: int) -> nn.Sequential:
    """[B, 3, 4 side, 4 side] -> [B, dim, side, side]."""
    a, b, c = widths
    return nn.Sequential(
        nn.PixelUnshuffle(2),
        nn.Conv2d(12, a, 3, padding=1),
        Residual(a),
        nn.Conv2d(a, b, 3, stride=2, padding=1),
        Residual(b),
        Context(b, c, side // 2),
        nn.GroupNorm(GROUPS, b),
        nn.SiLU(),
        nn.Conv2d(b, dim, 1),
    )


def pixel_decoder(dim: int, widths: tuple[int, int, int], side: int) -> nn.Sequential:
    """[B, dim, side, side] -> [B, 3, 4 side, 4 side]."""
    a, b, c = widths
    return nn.Sequential(
        nn.Conv2d(dim, b, 3, padding=1),
        Context(b, c, side // 2),
        Residual(b),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(b, a, 3, padding=1),
        Residual(a),
        nn.GroupNorm(GROUPS, a),
        nn.SiLU(),
        nn.Conv2d(a, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )


class SemanticEncoder(nn.Module):
    """[B, 3, 4 side, 4 side] -> [B, dim, side, side], computed at half the side and resized bilinearly."""

    def __init__(self, dim: int, widths: tuple[int, int], side: int, *, blocks: int = 2) -> None:
        super().__init__()
        b, c = widths
        self.body = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, b, 3, padding=1),
            nn.GroupNorm(GROUPS, b),
            nn.SiLU(),
            nn.Conv2d(b, c, 3, stride=2, padding=1),
            Residual(c),
            *(Attention(c, side // 2) for _ in range(blocks)),
            nn.GroupNorm(GROUPS, c),
            nn.Conv2d(c, dim, 1),
        )
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(self.body(images), (self.side, self.side), mode="bilinear", align_corners=False)


class SemanticDecoder(nn.Module):
    """[B, dim, side, side] -> [B, teacher_dim, side / 2, side / 2]: what the teacher would say."""

    def __init__(self, dim: int, width: int, side: int, teacher_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(dim, width, 1),
            Attention(width, side // 2),
            nn.GroupNorm(GROUPS, width),
            nn.Conv2d(width, teacher_dim, 1),
        )

    def forward(self, semantic: Tensor) -> Tensor:
        return self.body(semantic)
