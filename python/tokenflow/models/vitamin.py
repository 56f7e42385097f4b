"""ViTamin: convolutions down to a sixteenth of the side, then a transformer whose MLPs are gated; and its mirror, a decoder.

    encoder: x -> stem, MBConv stages, pool -> tokens -> blocks -> norm        no position embedding: any size
    decoder: tokens -> blocks -> norm -> grid -> nearest x2 + convolutions     four times x2

One encoder serves UniTok (sizes base and large) and, without the final norm, TokenFlow-L's semantic encoder (XL). Parameter
names are those of published checkpoints. Convolutions run on channels-last maps.

Source: Chen et al., "ViTamin", arXiv 2404.02132; the gated MLP with its own norm and the decoder: UniTok, arXiv 2502.20321.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenflow.models.upsample import UpConv

EPS = 1e-6
PATCH = 16
"""Pixels to a token, on each side."""


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]; a view of channels-last maps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GeGLU(nn.Module):
    """w2(gelu(w0 x') * w1 x') with x' = LayerNorm(x), [..., D] to [..., D]; gelu is the tanh approximation.

    Args:
        dim: D.
        hidden: width of the gate.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.w0, self.w1 = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.w2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class Attention(nn.Module):
    """Full self-attention over [B, L, D] in `heads` heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DropPath(nn.Module):
    """In training, a branch is left out of a sample with probability `rate`, else divided by 1 - rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """x + attention(norm(x)), then x + GeGLU(norm(x)): with the gate's own norm, each MLP sees two."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=EPS), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=EPS), GeGLU(dim, 2 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Blocks(nn.ModuleList):
    """A stack of blocks; drop-path rates rise from 0 to `drop_path`. `checkpointing` recomputes them in backward."""

    def __init__(self, dim: int, heads: int, depth: int, drop_path: float) -> None:
        super().__init__(Block(dim, heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3 x 3 convolution, under the name that checkpoints have for it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = UpConv(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Downsample(nn.Module):
    """Mean over 3 x 3 at every second pixel, padding not counted, then a 1 x 1 convolution where the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))


class MBConv(nn.Module):
    """Inverted bottleneck with LayerNorm: 1 x 1 to four times the output's width, depthwise 3 x 3, 1 x 1, plus a shortcut.

    Args:
        width: input channels.
        out: output channels; differs from `width` only where the side changes.
        resample: "down" halves the side, "up" doubles it, None keeps it.
    """

    def __init__(self, width: int, out: int, resample: str | None = None) -> None:
        super().__init__()
        change = {"down": Downsample, "up": Upsample}
        self.shortcut = change[resample](width, out) if resample else nn.Identity()
        self.pre_norm = LayerNorm2d(width, eps=EPS)
        self.conv1_1x1 = nn.Conv2d(width, 4 * out, 1)
        self.up = Upsample(4 * out, 4 * out) if resample == "up" else nn.Identity()
        stride = 2 if resample == "down" else 1
        self.conv2_kxk = nn.Conv2d(4 * out, 4 * out, 3, stride=stride, padding=1, groups=4 * out)
        self.conv3_1x1 = nn.Conv2d(4 * out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.conv1_1x1(self.pre_norm(x)))
        y = F.gelu(self.conv2_kxk(self.up(y)))
        return self.conv3_1x1(y) + self.shortcut(x)


class Stem(nn.Module):
    """3 x 3 convolution to half the side, norm, GELU, 3 x 3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm1 = LayerNorm2d(width, eps=EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.norm1(self.conv1(x))))


class Pool(nn.Module):
    """Norm, then a 3 x 3 convolution to half the side and the width of tokens."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(width, eps=EPS)
        self.proj = nn.Conv2d(width, out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x))


class Backbone(nn.Module):
    """Images [B, 3, H, W] to a map [B, dim, H/16, W/16]."""

    def __init__(self, widths: Sequence[int], stage_depths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.stem = Stem(widths[0])
        self.stages = nn.Sequential()
        for before, width, depth in zip((widths[0], *widths), widths, stage_depths):
            first = MBConv(before, width, "down")
            self.stages.append(nn.Sequential(first, *(MBConv(width, width) for _ in range(depth - 1))))
        self.pool = Pool(widths[-1], dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.stages(self.stem(images.contiguous(memory_format=torch.channels_last))))


class ViTamin(nn.Module):
    """Tokens of images, at a sixteenth of their side.

    Args:
        widths: channels of the two convolutional stages.
        dim: width D of tokens.
        depth: transformer blocks.
        heads: of the attention; not visible in the shapes of a checkpoint.
        final_norm: UniTok normalises the last tokens, TokenFlow-L does not.
        stage_depths: MBConv blocks of the stages.
        drop_path: rate of the last block in training.

    Source: arXiv 2404.02132. Head counts 12, 16 and 16 of base, large and XL: the first two as UniTok runs them, that of XL
    as ViTamin's authors publish it in timm (from memory, no golden value pins it down).

    Example:
        >>> ViTamin((8, 16), 32, depth=1, heads=4)(torch.zeros(1, 3, 32, 64)).shape
        torch.Size([1, 8, 32])
    """

    def __init__(
        self, widths: Sequence[int], dim: int, *, depth: int, heads: int, final_norm: bool = True,
        stage_depths: Sequence[int] = (2, 4), drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes("ViTamin", widths, dim, depth, heads, stage_depths, drop_path)
        self.patch_embed = nn.ModuleDict({"backbone": Backbone(widths, stage_depths, dim)})
        self.blocks = Blocks(dim, heads, depth, drop_path)
        self.norm = nn.LayerNorm(dim, eps=EPS) if final_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B, H/16 * W/16, D], row major, of images [B, 3, H, W].

        Raises:
            ValueError: another shape, or sides that are no multiples of 16.
        """
        if images.dim() != 4 or images.shape[1] != 3 or any(side < PATCH or side % PATCH for side in images.shape[2:]):
            raise ValueError(
                f"ViTamin: images: wanted [B, 3, H, W] with sides that are multiples of {PATCH}, got {list(images.shape)}"
            )
        return self.norm(self.blocks(self.patch_embed["backbone"](images).flatten(2).transpose(1, 2)))


class ViTaminDecoder(nn.Module):
    """Images from tokens: the encoder backwards, at 16 times the side of the grid.

    Args:
        widths: channels of the encoder's two stages; the decoder takes them in reverse.
        dim: width D of tokens.
        depth: transformer blocks.
        heads: of the attention; not visible in the shapes of a checkpoint.
        stage_depths: inverse MBConv blocks of the stages, coarse first.
        drop_path: rate of the last block in training.

    Source: UniTok, arXiv 2502.20321.

    Example:
        >>> decoder = ViTaminDecoder((8, 16), 32, depth=1, heads=4)
        >>> decoder(torch.zeros(1, 8, 32), (2, 4)).shape
        torch.Size([1, 3, 32, 64])
    """

    def __init__(
        self, widths: Sequence[int], dim: int, *, depth: int, heads: int, stage_depths: Sequence[int] = (4, 2),
        drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes("ViTaminDecoder", widths, dim, depth, heads, stage_depths, drop_path)
        fine, coarse = widths
        self.blocks = Blocks(dim, heads, depth, drop_path)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.up_conv1 = Upsample(dim, coarse)
        self.up_conv2 = self._stage(coarse, coarse, stage_depths[0])
        self.up_conv3 = self._stage(coarse, fine, stage_depths[1])
        self.up_conv4 = ToPixels(fine)

    @staticmethod
    def _stage(width: int, out: int, depth: int) -> nn.Sequential:
        return nn.Sequential(MBConv(width, out, "up"), *(MBConv(out, out) for _ in range(depth - 1)))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images [B, 3, 16 h, 16 w], not clamped, of tokens [B, h * w, D] on a grid (h, w)."""
        x = self.norm(self.blocks(tokens)).transpose(1, 2).unflatten(2, grid)
        x = self.up_conv1(x.contiguous(memory_format=torch.channels_last))
        return self.up_conv4(self.up_conv3(self.up_conv2(x)))


class ToPixels(nn.Module):
    """Nearest x2 and a convolution, norm, GELU, a convolution to three channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = Upsample(width, width)
        self.norm1 = LayerNorm2d(width, eps=EPS)
        self.conv2 = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.norm1(self.conv1(x))))


def check_sizes(owner, widths, dim, depth, heads, stage_depths, drop_path) -> None:
    """Raises a sentence where a constructor's sizes are none."""
    for name, pair in (("widths", widths), ("stage_depths", stage_depths)):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
            raise ValueError(f"{owner}: {name}: wanted two positive integers, got {pair!r}")
    for name, value in (("dim", dim), ("depth", depth), ("heads", heads)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name}: wanted a positive integer, got {value!r}")
    if dim % heads:
        raise ValueError(f"{owner}: heads: wanted a divisor of dim {dim}, got {heads}")
    if not isinstance(drop_path, int | float) or not 0 <= drop_path < 1:
        raise ValueError(f"{owner}: drop_path: wanted a rate in [0, 1), got {drop_path!r}")
