"""Residual quantization over a pyramid of scales, around a quantizer with one group."""

from collections.abc import Sequence

import torch
from torch import nn

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops import _multiscale_check
from tokenflow_ext.ops.multiscale import quantize_with_rows
from tokenflow_ext.quantize._codebook import keep_precision
from tokenflow_ext.quantize._quantizer import Quantizer


class MultiScaleQuantizer(nn.Module):
    """Residual quantization over a pyramid of scales (VAR, TokenFlow) around a quantizer with one group.

    r = f; for every scale: q = code(down(r)); f_hat += phi(up(q)); r -= phi(up(q)). Down is area, up is bicubic.

    Args:
        quantizer: a VectorQuantizer or SharedIndexQuantizer with groups = 1; its codebooks serve every scale.
        scales: ints or (h, w), usually coarse to fine.
        phi: (weight [P, C, C, 3, 3], bias [P, C], ratio, assignment of a P to each scale), learned when tensors are
            nn.Parameter; only with loss_on="accumulated".
        loss_on: "codes" (TokenFlow: mean over scales of the quantizer's loss) or "accumulated" (VAR).
        normalize_codes: whether f_hat is made of unit codes; None means metric == "cosine".
        scale_dropout: probability that a training batch skips one of scales 2..S; its ids are -1.

    Source: VAR, 2404.02905, algorithms 1 and 2; TokenFlow, 2412.03069.

    Example:
        >>> quantizer = MultiScaleQuantizer(SharedIndexQuantizer((6, 2), 64), (1, 2, 4))
        >>> f_hat, indices, loss = quantizer(torch.randn(2, 8, 4, 4))
        >>> indices.shape, [m.shape[1:] for m in quantizer.split(indices)]
        (torch.Size([2, 21]), [torch.Size([1, 1]), torch.Size([2, 2]), torch.Size([4, 4])])
    """

    gradient = "straight_through"

    def __init__(
        self, quantizer: Quantizer, scales: Sequence[int | tuple[int, int]], *, phi=None, loss_on: str = "codes",
        normalize_codes: bool | None = None, scale_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        name = type(self).__name__
        if not isinstance(quantizer, Quantizer) or quantizer.codebook.groups != 1:
            raise ValueError(
                f"{name}: quantizer: wanted a VectorQuantizer or SharedIndexQuantizer with groups = 1, got {quantizer!r}"
            )
        if quantizer.gradient != self.gradient:
            raise ValueError(
                f"{name}: quantizer: wanted one with the gradient {self.gradient!r}, got {quantizer.gradient!r}"
            )
        if not 0 <= ops._check.number(name, "scale_dropout", scale_dropout) <= 1:
            raise ValueError(f"{name}: scale_dropout: wanted a probability, got {scale_dropout}")
        self.scales = _multiscale_check.grids(name, scales)
        _multiscale_check.loss_on(name, loss_on, phi)
        _multiscale_check.unit_codes(name, quantizer.metric, normalize_codes)
        self.quantizer, self.loss_on, self.normalize_codes = quantizer, loss_on, normalize_codes
        self.scale_dropout = scale_dropout
        self.phi_ratio = self.phi_assignment = None
        if phi is not None:
            _multiscale_check.phi_rows(name, phi, quantizer.dim, len(self.scales))
            weight, bias, self.phi_ratio, self.phi_assignment = phi
            for key, value in (("phi_weight", weight), ("phi_bias", bias)):
                self.register_parameter(key, value) if isinstance(value, nn.Parameter) else self.register_buffer(
                    key, value
                )

    def _apply(self, fn, recurse=True):
        return keep_precision(self, super()._apply, fn, recurse)

    def _options(self, scales: Sequence[int] | None = None) -> dict:
        """Keywords of the multi-scale ops for the scales at these positions (all by default)."""
        positions = range(len(self.scales)) if scales is None else scales
        phi = None
        if self.phi_ratio is not None:
            phi = (self.phi_weight, self.phi_bias, self.phi_ratio, [self.phi_assignment[s] for s in positions])
        return {
            "scales": [self.scales[s] for s in positions],
            "metric": self.quantizer.metric,
            "phi": phi,
            "normalize_codes": self.normalize_codes,
            "backend": self.quantizer.backend,
        }

    def _kept(self) -> list[int]:
        """Positions of the scales that this batch uses."""
        positions = list(range(len(self.scales)))
        if (
            self.training
            and self.scale_dropout > 0
            and len(positions) > 1
            and float(torch.rand(())) < self.scale_dropout
        ):
            positions.remove(1 + int(torch.randint(len(positions) - 1, ())))
        return positions

    def _lengths(self, positions: Sequence[int]) -> list[int]:
        return [self.scales[s][0] * self.scales[s][1] for s in positions]

    def forward(self, features: torch.Tensor) -> Quantized:
        """Quantizes features [B, C, H, W] -> Quantized(f_hat [B, C, H, W], ids [B, L], 0-dim loss).

        Raises:
            ValueError, TypeError: wrong width or type, or a scale larger than the map.
        """
        q, kept = self.quantizer, self._kept()
        common = {**self._options(kept), "weights": q.weights, "loss_on": self.loss_on}
        weights = {"commitment_weight": q.commitment_weight, "codebook_weight": q.codebook_weight}
        _multiscale_check.maps("MultiScaleQuantizer", features)
        if self.training and features.shape[1] == q.dim:
            q.codebook.initialise(features.movedim(1, -1).reshape(-1, 1, q.dim), q.weights, q.backend)
        if not self.training:
            return ops.multiscale_quantize(features, q.codebooks(), **common, **weights)
        (f_hat, indices, loss), rows = quantize_with_rows(features, q.codebooks(), **common, **weights)
        if q.entropy_weight > 0:
            pooled = ops.multiscale_rows(features, indices, q.codebooks(), **common)
            loss = q._with_entropy(loss, [r.reshape(-1, 1, q.dim) for r in pooled.split(self._lengths(kept), dim=1)])
        q.codebook.observe(rows.reshape(-1, 1, q.dim), indices.reshape(-1, 1), q.backend)
        return Quantized(f_hat, self._with_dropped(indices, kept), loss)

    def _with_dropped(self, indices: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """Ids of the kept scales with -1 at the places of the dropped one."""
        if len(kept) == len(self.scales):
            return indices
        pieces = iter(indices.split(self._lengths(kept), dim=1))
        blank = [indices.new_full((len(indices), h * w), -1) for h, w in self.scales]
        return torch.cat([next(pieces) if s in kept else blank[s] for s in range(len(self.scales))], dim=1)

    @torch.no_grad()
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Ids [B, L] of features [B, C, H, W], all scales, without changing any state."""
        options = {**self._options(), "weights": self.quantizer.weights, "loss_on": self.loss_on}
        return ops.multiscale_quantize(features, self.quantizer.codebooks(), **options).indices

    def decode(self, indices: torch.Tensor, *, size: int | tuple[int, int] | None = None) -> torch.Tensor:
        """f_hat [B, C, H, W] of ids [B, any whole-scale prefix]; size is the map's, by default the largest scale."""
        return ops.multiscale_decode(indices, self.quantizer.codebooks(), size=self._size(size), **self._options())

    def inputs(
        self, indices: torch.Tensor, rule: str = "accumulate", *, refine: int | None = None, size=None
    ) -> torch.Tensor:
        """Inputs [B, rows, C] of an autoregressive model after a prefix of ids, see `ops.multiscale_inputs`."""
        options = {**self._options(), "size": self._size(size), "rule": rule, "refine": refine}
        return ops.multiscale_inputs(indices, self.quantizer.codebooks(), **options)

    def _size(self, size):
        return size if size is not None else (max(h for h, _ in self.scales), max(w for _, w in self.scales))

    def split(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """ids [B, whole-scale prefix] as one [B, h, w] map a scale.

        Raises:
            ValueError: a length that is not whole scales.
        """
        ops._check.ids("MultiScaleQuantizer.split", "indices", indices)
        if indices.dim() != 2:
            raise ValueError(f"MultiScaleQuantizer.split: indices: wanted [B, whole scales], got {list(indices.shape)}")
        maps, at = [], 0
        for h, w in self.scales:
            if at == indices.shape[1]:
                break
            maps.append(indices[:, at : at + h * w])
            at += h * w
        if at != indices.shape[1]:
            raise ValueError(
                f"MultiScaleQuantizer.split: indices: wanted a prefix of whole scales {self.scales}, got {indices.shape[1]} ids"
            )
        return [m.reshape(-1, h, w) for m, (h, w) in zip(maps, self.scales)]

    def codebooks(self) -> tuple[torch.Tensor, ...]:
        """The wrapped quantizer's tables."""
        return self.quantizer.codebooks()

    def usage(self) -> float:
        """Share of codes hit since `reset_usage()`, in training only."""
        return self.quantizer.usage()

    def perplexity(self) -> float:
        """exp of the entropy of those hits."""
        return self.quantizer.perplexity()

    def reset_usage(self) -> None:
        """Starts counting anew."""
        self.quantizer.reset_usage()

    def freeze(self) -> None:
        """Codebooks move no more, by no rule."""
        self.quantizer.freeze()
