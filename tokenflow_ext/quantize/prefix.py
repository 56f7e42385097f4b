"""Multi-scale quantization that trains on prefixes of its scales (ImageFolder's quantizer dropout)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops import _multiscale_check
from tokenflow_ext.ops._native import may_look, real
from tokenflow_ext.ops.multiscale import quantize_with_rows
from tokenflow_ext.quantize._gradients import straight_through
from tokenflow_ext.quantize._losses import two_sided
from tokenflow_ext.quantize._quantizer import Quantizer
from tokenflow_ext.quantize.multiscale import MultiScaleQuantizer


class PrefixMultiScaleQuantizer(MultiScaleQuantizer):
    """A MultiScaleQuantizer whose first samples of a training batch stop at random scales, so that prefixes decode well.

        f_s = sum_{t <= s} phi_t(Up q_t);   quantized_b = f_{n_b} of sample b;   a_bs = 1 where s <= n_b
        loss = mean_s [codebook_weight mean(a (f_s - sg x)^2) + commitment_weight mean(a (sg f_s - x)^2)] / mean_b a_bs

    n_b is uniform in min_depth .. S for the first `dropped` of a batch and S for the others. A sample's later scales are
    searched, counted and seen by averages and entropy like all; they add nothing to its output and its loss, and their ids
    are -1. ImageFolder's own code divides only the codebook term by the number of scales: commitment_weight = S beta.

    Args:
        quantizer: a VectorQuantizer or SharedIndexQuantizer with groups = 1; its codebooks serve every scale.
        scales: ints or (h, w), coarse to fine.
        dropped: share of a batch, from its start, that draws a depth.
        min_depth: smallest depth, 1 .. S.
        phi: as in MultiScaleQuantizer.
        normalize_codes: whether f is made of unit codes; None means metric == "cosine", ImageFolder: False.

    Raises:
        ValueError, TypeError: an argument that does not fit, in a sentence.

    Source: ImageFolder, arXiv 2410.01756.

    Example:
        >>> quantizer = PrefixMultiScaleQuantizer(VectorQuantizer(8, 64), (1, 2, 4), dropped=1.0)
        >>> f_hat, indices, loss = quantizer(torch.randn(2, 8, 4, 4), depths=torch.tensor([1, 3]))
        >>> bool((indices[0, 1:] == -1).all()), bool((quantizer.decode(indices[:1, :1]) == f_hat[:1]).all())
        (True, True)
    """

    def __init__(
        self, quantizer: Quantizer, scales: Sequence[int | tuple[int, int]], *, dropped: float, min_depth: int = 1, phi=None,
        normalize_codes: bool | None = None,
    ):  # fmt: skip
        super().__init__(quantizer, scales, phi=phi, loss_on="accumulated", normalize_codes=normalize_codes)
        name = "PrefixMultiScaleQuantizer"
        dropped = ops._check.share(name, "dropped", dropped)
        if not 1 <= ops._check.integer(name, "min_depth", min_depth) <= len(self.scales):
            raise ValueError(f"{name}: min_depth: wanted 1 to {len(self.scales)} scales, got {min_depth}")
        self.dropped, self.min_depth = dropped, min_depth

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """Depths [B] of a batch, by torch's generator of that device."""
        count, scales = int(batch * self.dropped), len(self.scales)
        drawn = torch.randint(self.min_depth, scales + 1, (count,), device=device)
        return torch.cat([drawn, drawn.new_full((batch - count,), scales)])

    def forward(self, features: Tensor, depths: Tensor | None = None) -> Quantized:
        """Quantizes features [B, C, H, W] -> Quantized(f_hat [B, C, H, W], ids [B, L], 0-dim loss).

        Args:
            features: any float type.
            depths: int64 [B], how many scales each sample keeps, 1 .. S; drawn where None, and in eval all are kept.

        Raises:
            ValueError, TypeError: wrong width or type, a scale larger than the map, depths of another shape.
        """
        if depths is None and not (self.training and self.dropped > 0):
            return super().forward(features)
        name, q = type(self).__name__, self.quantizer
        _multiscale_check.maps(name, features)
        depths = self.draw(features.shape[0], features.device) if depths is None else depths
        if ops._check.ids(name, "depths", depths).shape != features.shape[:1]:
            raise ValueError(f"{name}: depths: wanted {list(features.shape[:1])}, got {list(depths.shape)}")
        if may_look(depths):
            outside = depths[(depths < 1) | (depths > len(self.scales))]
            if len(outside):
                raise ValueError(f"{name}: depths: wanted 1 to {len(self.scales)} scales, got {int(outside[0])}")
        common = {**self._options(), "weights": q.weights, "loss_on": self.loss_on}
        if self.training and features.shape[1] == q.dim:
            self._initialise(features, None, common)
        with torch.no_grad(), q.codebook.quietly():
            (whole, indices, _), rows = quantize_with_rows(
                features, q.codebooks(), **common, commitment_weight=0.0, codebook_weight=0.0
            )
        active = depths[:, None] > torch.arange(len(self.scales), device=depths.device)
        kept = torch.where(self._by_cell(active), indices, -1)
        size = tuple(features.shape[2:])
        finite = whole.isfinite()
        decoded = torch.where(finite, self.decode(kept, size=size), torch.nan)
        loss = self._loss(features, indices, active, finite)
        if self.training:
            loss = self._train(features, indices, rows, loss, None, range(len(self.scales)), common)
        return Quantized(straight_through(features, decoded), kept, loss)

    def _by_cell(self, active: Tensor) -> Tensor:
        """[B, S] as [B, L]."""
        return torch.cat(
            [active[:, s : s + 1].expand(-1, n) for s, n in enumerate(self._lengths(range(len(self.scales))))], 1
        )

    def _loss(self, features: Tensor, indices: Tensor, active: Tensor, finite: Tensor) -> Tensor:
        q, size = self.quantizer, tuple(features.shape[2:])
        x = features.to(real(features, *self.codebooks()))
        f, loss = torch.zeros_like(x), x.new_zeros(())
        for s, ids in enumerate(indices.split(self._lengths(range(len(self.scales))), dim=1)):
            f = f + ops.multiscale_decode(ids, q.codebooks(), size=size, **self._options([s]))
            counted = active[:, s, None, None, None] & finite
            loss = loss + two_sided(q, f, x, counted) / (
                active[:, s].sum().clamp_min(1) * ops._check.count(x.shape[1:])
            )
        return loss / len(self.scales)
