"""The convolutional encoder and decoder of VQGAN, as TokenFlow and VAR use them.

    encoder: conv -> levels of residual blocks, each but the last halving the map -> middle -> norm, silu, conv -> project
    decoder: project -> conv -> middle -> levels, each but the last doubling the map -> norm, silu, conv

Attention (one head, over all cells of the map) follows each residual block of the lowest resolution and sits in the middle.
Everything runs in channels_last as well.

Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2012.09841.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.models.precision import in_full
from tokenflow.models.upsample import UpConv


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups; fewer where the channels do not divide."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def silu(fresh: Tensor) -> Tensor:
    """x sigmoid(x), in the place of a tensor that nobody else reads where no gradient needs it: a map has up to 26 MB a picture."""
    return F.silu(fresh, inplace=not fresh.requires_grad)


def plus(fresh: Tensor, other: Tensor) -> Tensor:
    """fresh + other, in the place of `fresh` likewise."""
    if fresh.requires_grad or other.requires_grad or fresh.dtype != other.dtype:
        return fresh + other
    return fresh.add_(other)


class Residual(nn.Module):
    """shortcut(x) + conv3(silu(norm(conv3(silu(norm(x))))))  on [B, C, H, W]; the shortcut is a 1 x 1 convolution if C changes."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return plus(h, self.shortcut(x))


class Attention(nn.Module):
    """x + out(softmax(q k^T / sqrt(C)) v)  over the cells of [B, C, H, W], one head, q, k, v = qkv(norm(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return plus(self.out(h), x)


class Down(nn.Conv2d):
    """A stride-2 convolution whose padding is one row below and one column on the right."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where there is any, then `resample`."""

    def __init__(self, channels: int, out: int, blocks: int, *, attention: bool, resample: nn.Module) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(Residual(channels if i == 0 else out, out) for i in range(blocks))
        self.attentions = nn.ModuleList(Attention(out) if attention else nn.Identity() for _ in range(blocks))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for residual, attention in zip(self.residuals, self.attentions, strict=True):
            x = attention(residual(x))
        return self.resample(x)


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(Residual(channels, channels), Attention(channels), Residual(channels, channels))


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, dim, H / 2^n, W / 2^n] for n + 1 widths, rounded down where H or W does not divide.

    Args:
        dim: channels of the result.
        widths: channels of the levels, full resolution first.
        blocks: residual blocks a level.
        latent: channels before the last projection.
        project: side of the last projection's kernel.
    """

    def __init__(self, dim: int, widths: Sequence[int], *, blocks: int = 2, latent: int, project: int = 1) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                blocks,
                attention=i == last,
                resample=nn.Identity() if i == last else Down(width),
            )
            for i, width in enumerate(widths)
        )
        self.middle = _middle(widths[last])
        self.norm_out, self.conv_out = norm(widths[last]), nn.Conv2d(widths[last], latent, 3, padding=1)
        self.project = nn.Conv2d(latent, dim, project, padding=project // 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        return in_full(self.project, self.conv_out(silu(self.norm_out(self.middle(x)))))


class Decoder(nn.Module):
    """[B, dim, h, w] -> [B, 3, 2^n h, 2^n w] for n + 1 widths.

    Args:
        dim: channels of the input.
        widths: channels of the levels, full resolution first, as in `Encoder`.
        blocks: residual blocks a level.
        latent: channels after the first projection.
        project: side of the first projection's kernel.
    """

    def __init__(self, dim: int, widths: Sequence[int], *, blocks: int = 3, latent: int, project: int = 1) -> None:
        super().__init__()
        widths, last = list(reversed(widths)), len(widths) - 1
        self.project = nn.Conv2d(dim, latent, project, padding=project // 2)
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.middle = _middle(widths[0])
        self.levels = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                blocks,
                attention=i == 0,
                resample=nn.Identity() if i == last else UpConv(width, width),
            )
            for i, width in enumerate(widths)
        )
        self.norm_out, self.conv_out = norm(widths[last]), nn.Conv2d(widths[last], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.middle(self.conv_in(self.project(codes)))
        for level in self.levels:
            x = level(x)
        return self.conv_out(silu(self.norm_out(x)))
