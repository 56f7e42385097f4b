"""Residual quantization over a pyramid of scales, around a quantizer with one group."""

from collections.abc import Sequence

import torch
from torch import nn

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops import _multiscale_check
from tokenflow_ext.ops.multiscale import quantize_with_rows
from tokenflow_ext.quantize import _usage
from tokenflow_ext.quantize._codebook import recomputing
from tokenflow_ext.quantize._masked import scale_losses
from tokenflow_ext.quantize._precision import FullPrecision
from tokenflow_ext.quantize._quantizer import Quantizer


def kept_scales(scales: int, dropout: float) -> list[int]:
    """Positions of the scales that a training batch uses: one of the second to the last is left out with this probability."""
    positions = list(range(scales))
    if dropout > 0 and scales > 1 and float(torch.rand(())) < dropout:
        positions.remove(1 + int(torch.randint(scales - 1, ())))
    return positions


class MultiScaleQuantizer(FullPrecision):
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
        scale_weights: w_s >= 0, loss = sum_s w_s loss_s / sum_s w_s over the scales of the batch; None for the plain mean, which
            costs less: the op sums it up itself, where weights need the pooled rows again ("codes") or the map after every
            scale ("accumulated").
        backend: "auto", "native" or "reference", for the quantizer inside as well; None leaves it the quantizer's.

    Attributes:
        scale_hits: [S, K] int64, how often each scale's rows chose each code in training since `reset_usage`.

    Source: VAR, 2404.02905, algorithms 1 and 2; TokenFlow, 2412.03069.

    Example:
        >>> quantizer = MultiScaleQuantizer(SharedIndexQuantizer((6, 2), 64), (1, 2, 4))
        >>> f_hat, indices, loss = quantizer(torch.randn(2, 8, 4, 4))
        >>> indices.shape, [m.shape[1:] for m in quantizer.split(indices)]
        (torch.Size([2, 21]), [torch.Size([1, 1]), torch.Size([2, 2]), torch.Size([4, 4])])
    """

    counters = ("scale_hits",)
    gradient = "straight_through"

    def __init__(
        self, quantizer: Quantizer, scales: Sequence[int | tuple[int, int]], *, phi=None, loss_on: str = "codes",
        normalize_codes: bool | None = None, scale_dropout: float = 0.0, scale_weights: Sequence[float] | None = None,
        backend: str | None = None,
    ):  # fmt: skip
        super().__init__()
        name = type(self).__name__
        wanted = f"{name}: quantizer: wanted a VectorQuantizer or SharedIndexQuantizer with groups = 1, got"
        if not isinstance(quantizer, Quantizer):
            raise TypeError(f"{wanted} {type(quantizer).__name__}")
        if quantizer.codebook.groups != 1:
            raise ValueError(f"{wanted} groups = {quantizer.codebook.groups}")
        if quantizer.gradient != self.gradient:
            raise ValueError(
                f"{name}: quantizer: wanted one with the gradient {self.gradient!r}, got {quantizer.gradient!r}"
            )
        backend = quantizer.backend if backend is None else ops._check.backend(name, backend)
        self.scales = _multiscale_check.grids(name, scales)
        _multiscale_check.loss_on(name, loss_on, phi)
        _multiscale_check.unit_codes(name, quantizer.metric, normalize_codes)
        self.quantizer, self.loss_on, self.normalize_codes = quantizer, loss_on, normalize_codes
        self.scale_dropout = ops._check.share(name, "scale_dropout", scale_dropout)
        self.scale_weights = None if scale_weights is None else self._checked_weights(scale_weights)
        self.scale_hits = torch.zeros(len(self.scales), quantizer.codebook.codes, dtype=torch.int64)
        self.phi_ratio = self.phi_assignment = None
        if phi is not None:
            _multiscale_check.phi_rows(name, phi, quantizer.dim, len(self.scales))
            weight, bias, self.phi_ratio, self.phi_assignment = phi
            for key, value in (("phi_weight", weight), ("phi_bias", bias)):
                self.register_parameter(key, value) if isinstance(value, nn.Parameter) else self.register_buffer(
                    key, value
                )
        quantizer.backend = backend

    def _checked_weights(self, weights) -> list[float]:
        if isinstance(weights, (str, torch.Tensor)) or not isinstance(weights, Sequence):
            got = type(weights).__name__
            raise TypeError(
                f"{type(self).__name__}: scale_weights: wanted a sequence of numbers, one a scale, got {got}"
            )
        if len(weights) != len(self.scales):
            raise ValueError(
                f"{type(self).__name__}: scale_weights: wanted one a scale, {len(self.scales)}, got {len(weights)}"
            )
        weights = [ops._check.non_negative(type(self).__name__, "scale_weights", w) for w in weights]
        if not sum(weights) > 0:
            raise ValueError(f"{type(self).__name__}: scale_weights: wanted one above 0, got {weights}")
        return weights

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
        return kept_scales(len(self.scales), self.scale_dropout if self.training else 0.0)

    def _lengths(self, positions: Sequence[int]) -> list[int]:
        return [self.scales[s][0] * self.scales[s][1] for s in positions]

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> Quantized:
        """Quantizes features [B, C, H, W] -> Quantized(f_hat [B, C, H, W], ids [B, L], 0-dim loss).

        Args:
            features: any float type.
            mask: bool [B], False for images that are padding: ids -1 and f_hat 0, left out of the loss (its means are over the
                other images), of statistics and every gradient, whatever they hold.

        Raises:
            ValueError, TypeError: wrong width, shape or type, or a scale larger than the map.
        """
        q, kept = self.quantizer, self._kept()
        common = {**self._options(kept), "weights": q.weights, "loss_on": self.loss_on}
        weights = {"commitment_weight": q.commitment_weight, "codebook_weight": q.codebook_weight}
        _multiscale_check.maps(type(self).__name__, features)
        x = features
        if mask is not None:
            ops._check.mask(type(self).__name__, mask, x.shape[:1], "one an image")
            x = x.masked_fill(~mask[:, None, None, None], 0)
        composed = mask is not None or self.scale_weights is not None
        if not (self.training or composed):
            return ops.multiscale_quantize(x, q.codebooks(), **common, **weights)
        if self.training and x.shape[1] == q.dim:
            self._initialise(x, mask, common)
        if composed:
            weights = {"commitment_weight": 0.0, "codebook_weight": 0.0}
        with q.codebook.quietly():
            (f_hat, indices, loss), rows = quantize_with_rows(x, q.codebooks(), **common, **weights)
            if composed:
                loss = self._weighted(scale_losses(q, x, indices, self._lengths(kept), common, mask), kept)
        if self.training:
            loss = self._train(x, indices, rows, loss, mask, kept, common)
        if mask is not None:
            f_hat, indices = f_hat.masked_fill(~mask[:, None, None, None], 0), indices.masked_fill(~mask[:, None], -1)
        return Quantized(f_hat, self._with_dropped(indices, kept), loss)

    def _weighted(self, losses: Sequence[torch.Tensor], kept: Sequence[int]) -> torch.Tensor:
        weights = [1.0 if self.scale_weights is None else self.scale_weights[s] for s in kept]
        return sum(w * loss for w, loss in zip(weights, losses)) / (sum(weights) or 1.0)

    def _initialise(self, x: torch.Tensor, mask, common: dict) -> None:
        """k-means on the pixels of the map, then on the rows of the loop over the codes that these gave."""
        q = self.quantizer
        if not q.codebook.waits_for_kmeans():
            return

        def masked(rows: torch.Tensor) -> torch.Tensor:
            """rows [B, n, C], NaN where the image is padding, as [B n, 1, C]."""
            rows = rows if mask is None else rows.masked_fill(~mask[:, None, None], torch.nan)
            return rows.reshape(-1, 1, q.dim)

        def loop() -> torch.Tensor:
            with q.codebook.quietly():
                return masked(
                    quantize_with_rows(x, q.codebooks(), **common, commitment_weight=0.0, codebook_weight=0.0)[1]
                )

        q.codebook.initialise(masked(x.detach().flatten(2).transpose(1, 2)), q.weights, q.backend, again=loop)

    def _train(self, x, indices, rows, loss, mask, kept: Sequence[int], common: dict) -> torch.Tensor:
        """Counts the batch, moves the codebooks, and gives the loss with its entropy term."""
        q, lengths = self.quantizer, self._lengths(kept)
        if q.entropy_weight > 0:
            pooled = ops.multiscale_rows(x, indices, q.codebooks(), **common)
            pooled = pooled if mask is None else pooled[mask]
            loss = q._with_entropy(loss, [r.reshape(-1, 1, q.dim) for r in pooled.split(lengths, dim=1)])
        good = rows.isfinite().all(-1)
        self._count(indices, good if mask is None else good & mask[:, None], kept)
        flat_mask = None if mask is None else mask[:, None].expand(indices.shape).reshape(-1)
        with q.codebook.quietly():
            q.codebook.observe(rows.reshape(-1, 1, q.dim), indices.reshape(-1, 1), q.backend, mask=flat_mask)
        return loss

    def _count(self, indices: torch.Tensor, good: torch.Tensor, kept: Sequence[int]) -> None:
        """Adds ids [B, L] to the hits of their scales, where good [B, L] holds."""
        if recomputing():
            return
        codes = self.scale_hits.shape[1]
        parts = zip(kept, indices.split(self._lengths(kept), dim=1), strict=True)
        places = torch.cat([ids + s * codes for s, ids in parts], dim=1)
        self.scale_hits.view(-1).scatter_add_(0, places.reshape(-1), good.to(torch.int64).reshape(-1))

    def _with_dropped(self, indices: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """Ids of the kept scales with -1 at the places of the dropped one."""
        if len(kept) == len(self.scales):
            return indices
        maps = [indices.new_full((len(indices), h * w), -1) for h, w in self.scales]
        # By assignment: Dynamo takes `s in kept` of another dropped scale for what it was.
        for s, ids in zip(kept, indices.split(self._lengths(kept), dim=1)):
            maps[s] = ids
        return torch.cat(maps, dim=1)

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
        ops._check.ids(f"{type(self).__name__}.split", "indices", indices)
        if indices.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}.split: indices: wanted [B, whole scales], got {list(indices.shape)}"
            )
        maps, at = [], 0
        for h, w in self.scales:
            if at == indices.shape[1]:
                break
            maps.append(indices[:, at : at + h * w])
            at += h * w
        if at != indices.shape[1]:
            raise ValueError(
                f"{type(self).__name__}.split: indices: wanted a prefix of whole scales {self.scales}, got {indices.shape[1]} ids"
            )
        return [m.reshape(-1, h, w) for m, (h, w) in zip(maps, self.scales)]

    def codebooks(self) -> tuple[torch.Tensor, ...]:
        """The wrapped quantizer's tables."""
        return self.quantizer.codebooks()

    def usage(self, per: str | None = None, *, all_ranks: bool = True) -> float | torch.Tensor:
        """Share of codes hit since `reset_usage()`, in training only.

        Args:
            per: None for all scales together; "scale" for each, float64 [S] on the CPU: a scale of few rows hits few codes.
            all_ranks: see `VectorQuantizer.usage`, which also tells what is warned of here.
        """
        return self.quantizer.codebook.usage(self._hits(per), per, all_ranks)

    def perplexity(self, per: str | None = None, *, all_ranks: bool = True) -> float | torch.Tensor:
        """exp of the entropy of those hits; arguments as in `usage`."""
        return self.quantizer.codebook.perplexity(self._hits(per), per, all_ranks)

    def _hits(self, per: str | None) -> torch.Tensor:
        _usage.known_part(type(self).__name__, per, "scale")
        return self.quantizer.codebook.hits if per is None else self.scale_hits

    def non_finite_rows(self, *, all_ranks: bool = True) -> int:
        """Pooled rows with NaN or inf since `reset_usage()`, in training."""
        return self.quantizer.non_finite_rows(all_ranks=all_ranks)

    def reset_usage(self) -> None:
        """Starts counting anew."""
        self.quantizer.reset_usage()
        self.scale_hits.zero_()

    def freeze(self) -> None:
        """Codebooks move no more, by no rule."""
        self.quantizer.freeze()
