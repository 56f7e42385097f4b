"""Transformer block with block-causal attention, written once for training and for cached sampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Cache = tuple[Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, past: Cache | None = None, alone: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, in which the last `alone` rows see no row of their own group but themselves.

    The first n - alone rows see the past and each other, as the mask allows. The last `alone` rows see the past and the first rows,
    as the last row of the mask allows, and themselves: any subset of them can be computed without the others.

    Args:
        q, k, v: [B, heads, n, d].
        past: keys and values of earlier rows, [B, heads, m, d] each.
        mask: added to the scores, 0 or -inf: [B, 1, n - alone or 1, m + n - alone].
        alone: number of rows at the end that see only themselves of their group.

    Returns:
        [B, heads, n, d].
    """
    first = q.shape[2] - alone
    q = q * q.shape[3] ** -0.5
    keys, values = k[:, :, :first], v[:, :, :first]
    if past is not None:
        keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
    parts = []
    if first:
        scores = q[:, :, :first] @ keys.transpose(2, 3) + mask
        parts.append(scores.softmax(-1).to(values.dtype) @ values)
    if alone:
        scores = q[:, :, first:] @ keys.transpose(2, 3) + mask[:, :, -1:]
        own = (q[:, :, first:] * k[:, :, first:]).sum(-1, keepdim=True)
        share = torch.cat([scores, own], dim=-1).softmax(-1).to(values.dtype)
        parts.append(share[..., :-1] @ values + share[..., -1:] * v[:, :, first:])
    return torch.cat(parts, dim=2)


class Block(nn.Module):
    """x + attention(LN x), then x + mlp(LN x); both output layers start at zero.

    Args:
        width: channels of x.
        heads: attention heads.
        ratio: hidden channels of the mlp over `width`.
    """

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)
        for layer in (self.qkv, self.out, self.up, self.down):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, *, mask: Tensor, past: Cache | None = None, alone: int = 0) -> tuple[Tensor, Cache]:
        """x [B, n, width] -> the same shape, and keys and values [B, heads, n, d] of these rows. Options as in `attend`."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v, past=past, mask=mask, alone=alone)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x, (k, v)
