"""One vision transformer for three uses: CLIP's tower, SigLIP's tower, and TokenFlow's semantic decoder.

    x = positions + [class token, patches(map)];   x += out(attention(norm1(x)));   x += mlp(norm2(x))

It is ours and not transformers' because everything that differs between the three lies outside the blocks (positions that
stretch as the authors stretch them, which cells come out, norms before and after), because names in its state dict change
between transformers 4 and 5, and because the third use has no counterpart there. The tests compare it with transformers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


def stretch(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions [n, n, D] for another grid: [h, w, D], bicubic.

    The sampling ratio is n / (h + 0.1), not n / h: DINO's guard against rounding, which the authors' models were used with. The
    trained grid keeps its bits.
    """
    side = positions.shape[0]
    if grid == (side, side):
        return positions
    ratio = [(n + 0.1) / side for n in grid]
    maps = positions.permute(2, 0, 1)[None].float()
    return F.interpolate(maps, scale_factor=ratio, mode="bicubic")[0].permute(1, 2, 0).to(positions.dtype)


class Block(nn.Module):
    """A pre-norm transformer block on rows [B, N, D]."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """[B, C, H, W] -> [B, h, w, width], h = H // patch: the cells of the last block, without the class token.

    Args:
        channels: C.
        width: D.
        depth: number of blocks.
        heads: number of heads.
        hidden: width of the MLPs.
        patch: side of a patch.
        grid: side of the grid that the positions were learned on; others are stretched to.
        activation: a name of ACTIVATIONS.
        eps: of the norms.
        class_token: one more row, seen by the others.
        patch_bias: whether patches have a bias.
        pre_norm: a norm before the first block (CLIP).
        post_norm: a norm after the last.

    Example:
        >>> tower = VisionTransformer(3, 32, depth=1, heads=2, hidden=64, patch=4, grid=4)
        >>> tower(torch.zeros(2, 3, 16, 24)).shape
        torch.Size([2, 4, 6, 32])
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        depth: int,
        heads: int,
        hidden: int,
        patch: int,
        grid: int,
        activation: str = "gelu",
        eps: float = 1e-6,
        class_token: bool = False,
        patch_bias: bool = True,
        pre_norm: bool = False,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"VisionTransformer: activation: wanted one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if width % heads:
            raise ValueError(f"VisionTransformer: heads: wanted a divisor of the width {width}, got {heads}")
        self.grid = grid
        self.patches = nn.Conv2d(channels, width, patch, stride=patch, bias=patch_bias)
        self.class_token = nn.Parameter(torch.zeros(width)) if class_token else None
        self.positions = nn.Parameter(0.02 * torch.randn(grid * grid + class_token, width))
        self.pre_norm = nn.LayerNorm(width, eps=eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, hidden, activation, eps) for _ in range(depth))
        self.post_norm = nn.LayerNorm(width, eps=eps) if post_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        b, h, w, d = x.shape
        cells = self.positions[-(self.grid**2) :].view(self.grid, self.grid, d)
        x = (x + stretch(cells, (h, w))).reshape(b, h * w, d)
        if self.class_token is not None:
            x = torch.cat([(self.class_token + self.positions[0]).expand(b, 1, d), x], dim=1)
        x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.post_norm(x[:, -h * w :]).view(b, h, w, d)
