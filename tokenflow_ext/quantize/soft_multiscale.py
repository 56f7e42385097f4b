"""Residual quantization over scales whose residual carries gradients (CODA), around a quantizer with a softmax gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenflow_ext import ops
from tokenflow_ext._scales import pair
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops import _multiscale_check
from tokenflow_ext.ops._native import real
from tokenflow_ext.quantize._resample import resample
from tokenflow_ext.quantize.multiscale import MultiScaleQuantizer
from tokenflow_ext.quantize.soft import SoftQuantizer


class SoftMultiScaleQuantizer(MultiScaleQuantizer):
    """CODA's residual over a pyramid of scales, nothing of it detached.

        r_1 = x;   z_s = quantizer(Down r_s);   r_{s+1} = r_s - Up z_s;   quantized = sum_s Up z_s
        loss = mean over scales of the quantizer's loss on Down r_s, entropy term included

    Down is area, Up bicubic (a = -0.75, align_corners False). Every z_s is a hard code with a softmax's gradient, so later
    scales send theirs through the residual to the codes of the earlier ones.

    Args:
        quantizer: an AttentionQuantizer (CODA) or IndexPropagationQuantizer; its tables serve every scale.
        scales: ints or (h, w), usually coarse to fine.

    Raises:
        ValueError, TypeError: another quantizer, or scales that are none.

    Source: CODA, arXiv 2503.17760.

    Example:
        >>> quantizer = SoftMultiScaleQuantizer(AttentionQuantizer(8, 64), (1, 2, 4))
        >>> f_hat, indices, loss = quantizer(torch.randn(2, 8, 4, 4))
        >>> indices.shape, bool((quantizer.decode(indices) == f_hat).all())
        (torch.Size([2, 21]), True)
    """

    gradient = SoftQuantizer.gradient

    def __init__(self, quantizer: SoftQuantizer, scales: Sequence[int | tuple[int, int]]):
        super().__init__(quantizer, scales)

    def _checked(self, features: Tensor) -> Tensor:
        name, dim = type(self).__name__, self.quantizer.dim
        _multiscale_check.maps(name, features)
        if features.shape[1] != dim:
            raise ValueError(f"{name}: features: wanted {dim} channels, got {features.shape[1]}")
        return features.to(real(features, self.codebooks()[0]))

    def _fitting(self, size) -> tuple[int, int]:
        for i, (h, w) in enumerate(self.scales):
            if h > size[0] or w > size[1]:
                raise ValueError(f"{type(self).__name__}: scales[{i}]: wanted at most the map's {size}, got {(h, w)}")
        return size

    def _loop(self, features: Tensor, quantize) -> tuple[Tensor, Tensor, list]:
        """f_hat, ids [B, L] and, a scale, what `quantize(rows, keys, values)` returns beside codes and ids."""
        tables, residual = self.quantizer.keys_and_values(), self._checked(features)
        size = self._fitting(tuple(features.shape[2:]))
        f_hat, ids, others = torch.zeros_like(residual), [], []
        for grid in self.scales:
            quantized, indices, *other = quantize(resample(residual, grid, "area").movedim(1, -1), *tables)
            step = resample(quantized.movedim(-1, 1), size, "bicubic")
            f_hat, residual = f_hat + step, residual - step
            ids.append(indices.flatten(1))
            others.append(other)
        return f_hat, torch.cat(ids, dim=1), others

    def forward(self, features: Tensor) -> Quantized:
        """Quantizes features [B, C, H, W] -> Quantized(f_hat [B, C, H, W], ids [B, L], 0-dim loss).

        Raises:
            ValueError, TypeError: wrong width or type, or a scale larger than the map.
        """
        good = []

        def step(rows: Tensor, *tables: Tensor) -> Quantized:
            good.append(rows.detach().isfinite().all(-1).flatten(1))
            return self.quantizer.step(rows, *tables)

        f_hat, indices, losses = self._loop(features, step)
        if self.training:
            self._count(indices, torch.cat(good, dim=1), range(len(self.scales)))
        return Quantized(f_hat.to(features.dtype), indices, sum(loss for (loss,) in losses) / len(losses))

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """Ids [B, L] of features [B, C, H, W], without changing any state."""
        return self._loop(features, self.quantizer.choose)[1]

    def _maps(self, indices: Tensor, size) -> list[Tensor]:
        """f_hat [B, C, H, W] after each scale of a prefix, none at first."""
        values = self.quantizer.keys_and_values()[1]
        f_hat = values.new_zeros((indices.shape[0], values.shape[1], *size))
        maps = [f_hat]
        for ids in self.split(indices):
            rows = ops.lookup(ids, values, backend=self.quantizer.backend)
            f_hat = f_hat + resample(rows.movedim(-1, 1), size, "bicubic")
            maps.append(f_hat)
        return maps

    def decode(self, indices: Tensor, *, size: int | tuple[int, int] | None = None) -> Tensor:
        """f_hat [B, C, H, W] of ids [B, any whole-scale prefix]; size is the map's, by default the largest scale."""
        return self._maps(indices, self._pair(size))[-1]

    def inputs(self, indices: Tensor, rule: str = "accumulate", *, size: int | tuple[int, int] | None = None) -> Tensor:
        """Inputs [B, rows, C] of an autoregressive model after a prefix of ids: f_hat of each scale, Down to the next.

        Raises:
            ValueError: another rule than "accumulate".
        """
        ops._check.one_of(type(self).__name__, "rule", rule, ("accumulate",))
        empty, *maps = self._maps(indices, self._pair(size))
        rows = [resample(f, grid, "area").flatten(2).mT for f, grid in zip(maps, self.scales[1:])]
        return torch.cat(rows, dim=1) if rows else empty.flatten(2).mT[:, :0]

    def _pair(self, size) -> tuple[int, int]:
        return self._fitting(pair(type(self).__name__, "size", self._size(size)))
