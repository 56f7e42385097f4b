"""UniTok's attention projection: a change of width that mixes tokens, to the codes' width and back.

    x <- Linear(LN3(x)) + Attention(LN1(x)),   x <- x + GeGLU(LN2(x))

To fewer channels, attention works at the input's width and *averages* its heads; to more, at the output's width, and
concatenates them.

Source: UniTok, arXiv 2502.20321, section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.models.vitamin import GeGLU


class ProjectionAttention(nn.Module):
    """Attention [B, L, dim] -> [B, L, out]; keys have no bias, as one would move all scores of a row alike."""

    def __init__(self, dim: int, out: int, heads: int, causal: bool) -> None:
        super().__init__()
        width = max(dim, out)
        self.heads, self.causal, self.compress, self.out = heads, causal, dim > out, out
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        if not self.compress:
            return self.proj(y.transpose(1, 2).flatten(2))
        y = y.mean(1)
        return self.proj(y if y.shape[-1] == self.out else F.adaptive_avg_pool1d(y, self.out))


class AttnProjection(nn.Module):
    """Tokens [B, L, dim] to [B, L, out] by attention, a linear shortcut and a gated MLP.

    `heads` and `causal` leave no trace in a checkpoint's shapes: weights made for 16 heads load into 8 and compute something
    else.

    Args:
        dim: input channels.
        out: output channels.
        heads: of the attention; must divide the larger width. Where heads of dim/heads channels are not as wide as `out`, their
            mean is pooled to it.
        causal: a token attends to itself and those before it.

    Raises:
        ValueError: a size that is none, or heads that do not divide the width.

    Source: arXiv 2502.20321, section 3.3.

    Example:
        >>> AttnProjection(64, 16, heads=4)(torch.zeros(2, 9, 64)).shape
        torch.Size([2, 9, 16])
    """

    def __init__(self, dim: int, out: int, *, heads: int, causal: bool = False) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("out", out), ("heads", heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"AttnProjection: {name}: wanted a positive integer, got {value!r}")
        if max(dim, out) % heads:
            raise ValueError(f"AttnProjection: heads: wanted a divisor of {max(dim, out)}, got {heads}")
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(out), nn.LayerNorm(dim)
        self.attn = ProjectionAttention(dim, out, heads, bool(causal))
        self.proj = nn.Linear(dim, out)
        self.mlp = GeGLU(out, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
