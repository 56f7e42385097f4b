"""The residual head: from a hidden state to a distribution over the codes of a token.

The tokenizer's index at scale k is argmax over codes e of sum_t w_t e_t . unit(h_t - x_t), where h is the picture's feature map
seen at scale k, x what the scales before have already written there, t the halves of the shared index. The generator knows x
exactly. So the head predicts h, subtracts x and scores the codes as the tokenizer does,

    r = draft + W y - x,    logits = sum_t kappa_t(y) w_t e_t . unit(r_t) + e' . A y + b

With the true h the best code is the tokenizer's. What earlier scales got wrong is corrected, because it is part of x; and where h
nearly equals x, as on a white ground, the index is still the right one, though its code looks random. kappa says how sure it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResidualHead(nn.Module):
    """Logits of every code.

    Args:
        width: channels of the hidden state y.
        codebooks: one [K, D_t] a half, rows as searched (unit); copied, not trained.
        weights: w_t of the search.
        levels: S, number of scales.
        low_rank: rows of A.
    """

    def __init__(
        self, width: int, codebooks: Sequence[Tensor], weights: Sequence[float], levels: int, low_rank: int
    ) -> None:
        super().__init__()
        self.dims = [c.shape[1] for c in codebooks]
        count = codebooks[0].shape[0]
        weighted = torch.cat([w * c for w, c in zip(weights, codebooks, strict=True)], dim=1)
        self.register_buffer("codes", weighted.detach().float().contiguous())
        self.correction = nn.Linear(width, sum(self.dims))
        self.sharpness = nn.Linear(width, len(self.dims))
        self.level_sharpness = nn.Parameter(torch.full((levels, len(self.dims)), 0.5))
        self.low_rank = nn.Linear(width, low_rank)
        self.own_codes = nn.Parameter(torch.randn(count, low_rank) * low_rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(count))
        with torch.no_grad():
            self.correction.weight.mul_(0.2)
            self.low_rank.weight.mul_(0.2)
        for layer in (self.correction, self.sharpness, self.low_rank):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.sharpness.weight)

    def forward(self, y: Tensor, draft: Tensor, inputs: Tensor, level: Tensor) -> Tensor:
        """float32 logits [B, n, K].

        Args:
            y: hidden states [B, n, width].
            draft, inputs: draft of h, and x, at the same positions, [B, n, C] each.
            level: scale of each position, int64 [n] or [B, n].
        """
        rows = self.rows(y, draft, inputs, level)
        with torch.autocast(y.device.type, enabled=False):
            return nn.functional.linear(rows, self.table(), self.bias)

    def loss(
        self, y: Tensor, draft: Tensor, inputs: Tensor, level: Tensor, target: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted mean of the cross-entropy, 0-dim, and the cross-entropy of each token without gradient, [B, n]; in nats.

        Args:
            y, draft, inputs, level: as in `forward`.
            target: the true codes, int64 [B, n].
            share: weight of each token, [B, n].
        """
        rows = self.rows(y, draft, inputs, level).flatten(0, 1)
        with torch.autocast(y.device.type, enabled=False):
            mean, each = CodeCrossEntropy.apply(
                rows, self.table(), self.bias, target.flatten(), (share / share.sum()).flatten()
            )
        return mean, each.view_as(target)

    def rows(self, y: Tensor, draft: Tensor, inputs: Tensor, level: Tensor) -> Tensor:
        """What meets the codes: float32 [B, n, C + low_rank]."""
        residual = draft + self.correction(y).float() - inputs
        units = [nn.functional.normalize(part, dim=-1) for part in residual.split(self.dims, dim=-1)]
        kappa = (nn.functional.embedding(level, self.level_sharpness) + self.sharpness(y).float()).clamp(max=4.0).exp()
        return torch.cat([u * kappa[..., t, None] for t, u in enumerate(units)] + [self.low_rank(y).float()], dim=-1)

    def table(self) -> Tensor:
        """[K, C + low_rank]: the weighted codes beside the free ones."""
        return torch.cat([self.codes, self.own_codes], dim=1)


class CodeCrossEntropy(torch.autograd.Function):
    """sum_n share_n (logsumexp(z_n) - z_n[target_n]) with z = rows table^T + bias, never holding more than a chunk of z.

    The gradient share_n (softmax(z_n) - onehot) is closed, so it meets rows and table while the chunk is still in the cache
    instead of being written out and read back with z [N, K] several times.
    """

    CHUNK = 256

    @staticmethod
    def forward(ctx, rows: Tensor, table: Tensor, bias: Tensor, target: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """rows [N, R], table [K, R], bias [K], target int64 [N], share [N] -> the sum, 0-dim, and each cross-entropy [N]."""
        each, d_rows = torch.empty(len(rows)), torch.empty_like(rows)
        d_table, d_bias = torch.zeros_like(table), torch.zeros_like(bias)
        for i in range(0, len(rows), CodeCrossEntropy.CHUNK):
            part = slice(i, i + CodeCrossEntropy.CHUNK)
            z = torch.addmm(bias, rows[part], table.T)
            best = z.amax(1, keepdim=True)
            hit = z.gather(1, target[part, None])
            z.sub_(best).exp_()
            total = z.sum(1, keepdim=True)
            each[part] = (total.log() + best - hit)[:, 0]
            z.mul_(share[part, None] / total)
            z.scatter_add_(1, target[part, None], -share[part, None])
            torch.mm(z, table, out=d_rows[part])
            d_table.addmm_(z.T, rows[part])
            d_bias.add_(z.sum(0))
        ctx.save_for_backward(d_rows, d_table, d_bias)
        ctx.mark_non_differentiable(each)
        return (each * share).sum(), each

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_table, d_bias = ctx.saved_tensors
        return grad * d_rows, grad * d_table, grad * d_bias, None, None
