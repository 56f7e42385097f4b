"""tokenflow-tiny layer by layer, and a step that trains it: maps contiguous, the published quantizer's expression in every scale,
codebooks that follow their rows by averages over one-hot matrices.
"""

import torch
import torch.nn.functional as F
from bench_multiscale import tokenflow_loop
from eager_layers import Load, attend, heads
from torch import nn


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


class Attention(nn.Module):
    def __init__(self, channels: int, side: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, side * side, channels))
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 3 * channels), nn.GELU(), nn.Linear(3 * channels, channels))

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2)
        q, k, v = heads(self.qkv(self.norm1(rows + self.position)), 4)
        rows = rows + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        rows = rows + self.mlp(self.norm2(rows))
        return rows.transpose(1, 2).reshape(x.shape)


class Context(nn.Module):
    def __init__(self, channels: int, wide: int, side: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 3, stride=2, padding=1), Residual(wide), Attention(wide, side),
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(wide, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


class Resized(nn.Module):
    """The semantic encoder's body and its bilinear resize."""

    def __init__(self, body: nn.Sequential, side: int):
        super().__init__()
        self.body, self.side = body, side

    def forward(self, x):
        return F.interpolate(self.body(x), (self.side, self.side), mode="bilinear", align_corners=False)


class Tiny(Load):
    """tokenflow-tiny with the weights of this package's model."""

    def __init__(self, model):
        super().__init__()
        c = model.config
        (a, b, w), side, half, dim, sem = c.widths, c.scales[-1], c.scales[-1] // 2, c.pixel_dim, c.semantic_dim
        self.pixel_encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, a, 3, padding=1), Residual(a), nn.Conv2d(a, b, 3, stride=2, padding=1),
            Residual(b), Context(b, w, half), nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, dim, 1),
        )  # fmt: skip
        self.pixel_decoder = nn.Sequential(
            nn.Conv2d(dim, b, 3, padding=1), Context(b, w, half), Residual(b), nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(b, a, 3, padding=1), Residual(a), nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )  # fmt: skip
        self.semantic_encoder = Resized(
            nn.Sequential(
                nn.PixelUnshuffle(4), nn.Conv2d(48, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                nn.Conv2d(b, w, 3, stride=2, padding=1), Residual(w), Attention(w, half), Attention(w, half),
                nn.GroupNorm(8, w), nn.Conv2d(w, sem, 1),
            ), side,
        )  # fmt: skip
        body = [
            nn.AvgPool2d(2),
            nn.Conv2d(sem, w, 1),
            Attention(w, half),
            nn.GroupNorm(8, w),
            nn.Conv2d(w, c.teacher_dim, 1),
        ]
        self.semantic_decoder = nn.ModuleDict({"body": nn.Sequential(*body)})
        self.config = c
        codes = model.quantizer.quantizer.codebook
        self.tables = [t.detach().clone() for t in codes.tables()]
        self.counts, self.sums = codes.ema_counts[0].clone(), codes.ema_sums[0].clone()
        self.load(model.state_dict()).train()

    def forward(self, images):
        """(images, semantic, ids, loss); moves the codebooks."""
        c = self.config
        features = torch.cat([self.semantic_encoder(images), self.pixel_encoder(images)], 1)
        f_hat, ids, loss = tokenflow_loop(
            features, *self.tables, scales=c.scales, training=True, pixel_weight=c.pixel_weight
        )
        semantic, pixel = f_hat.split([c.semantic_dim, c.pixel_dim], 1)
        decoded = self.pixel_decoder(pixel), self.semantic_decoder["body"](semantic)
        self.follow(features.detach(), ids)
        return *decoded, ids, loss

    @torch.no_grad()
    def follow(self, features, ids):
        """counts <- d counts + (1 - d) O^T 1, sums <- d sums + (1 - d) O^T y, code <- sums / counts, made unit, if it was hit."""
        c, residual, rows = self.config, features, []
        widths = [c.semantic_dim, c.pixel_dim]
        for s, part in zip(c.scales, ids.split([s * s for s in c.scales], 1)):
            pooled = F.interpolate(residual, size=(s, s), mode="area").permute(0, 2, 3, 1).reshape(-1, sum(widths))
            rows.append(torch.cat([F.normalize(p, dim=-1) for p in pooled.split(widths, 1)], 1))
            codes = torch.cat([F.normalize(t, dim=-1)[part.reshape(-1)] for t in self.tables], 1)
            maps = codes.view(len(ids), s, s, -1).permute(0, 3, 1, 2)
            residual = residual - F.interpolate(maps, size=features.shape[2:], mode="bicubic")
        flat = torch.cat([p.reshape(-1) for p in ids.split([s * s for s in c.scales], 1)])
        one_hot = F.one_hot(flat, c.codebook_size).to(features.dtype)
        hits = one_hot.sum(0)
        self.counts.mul_(c.decay).add_(hits, alpha=1 - c.decay)
        self.sums.mul_(c.decay).add_(one_hot.T @ torch.cat(rows), alpha=1 - c.decay)
        means = (self.sums / self.counts.clamp_min(1e-12)[:, None]).split(widths, 1)
        for table, mean in zip(self.tables, means):
            table.copy_(torch.where((hits > 0)[:, None], F.normalize(mean, dim=-1), table))
