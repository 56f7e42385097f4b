"""Drop-in quantizer modules: one codebook, grouped codebooks, TokenFlow's shared index, and multi-scale around either."""

from collections.abc import Sequence

import torch
from torch import nn

from tokenflow_ext import ops
from tokenflow_ext._codebook import Codebook, keep_precision
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops import _multiscale_check
from tokenflow_ext.ops._native import BACKENDS
from tokenflow_ext.ops.multiscale import quantize_with_rows
from tokenflow_ext.ops.quantize import quantize_and_count, shared_quantize_and_count

__all__ = ["MultiScaleQuantizer", "Quantized", "SharedIndexQuantizer", "VectorQuantizer"]


class _Quantizer(nn.Module):
    """What VectorQuantizer and SharedIndexQuantizer have in common; a subclass says how x falls into tables."""

    def __init__(
        self, widths, codebook_size, groups, weights, metric, update, commitment_weight, codebook_weight, entropy_weight,
        entropy_temperature, entropy_eps, decay, kmeans_init, dead_code_threshold, channel_dim, backend,
    ):  # fmt: skip
        super().__init__()
        name = type(self).__name__
        if backend not in BACKENDS:
            raise ValueError(f"{name}: backend: wanted one of {', '.join(BACKENDS)}, got {backend!r}")
        if not ops._check.number(name, "entropy_temperature", entropy_temperature) > 0:
            raise ValueError(f"{name}: entropy_temperature: wanted a number > 0, got {entropy_temperature}")
        self.weights = ops._check.table_weights(name, weights, len(widths))
        self.metric, self.backend = metric, backend
        self.channel_dim = ops._check.integer(name, "channel_dim", channel_dim)
        self.commitment_weight = ops._check.non_negative(name, "commitment_weight", commitment_weight)
        self.codebook_weight = (
            ops._check.non_negative(name, "codebook_weight", codebook_weight) if update == "gradient" else 0.0
        )
        self.entropy_weight = ops._check.non_negative(name, "entropy_weight", entropy_weight)
        self.entropy_temperature = entropy_temperature
        self.entropy_eps = ops._check.non_negative(name, "entropy_eps", entropy_eps)
        self.codebook = Codebook(
            name, widths, codebook_size, groups, metric, update, decay, kmeans_init, dead_code_threshold
        )

    @property
    def dim(self) -> int:
        """Channels of the input."""
        return sum(self.codebook.widths) * self.codebook.groups

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """x with channels at `channel_dim` as [..., C], or [..., G, D] where G > 1."""
        ops._check.floating(type(self).__name__, "x", x)
        if x.dim() < 1 or not -x.dim() <= self.channel_dim < x.dim() or x.shape[self.channel_dim] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x: wanted {self.dim} channels at axis {self.channel_dim}, got {list(x.shape)}"
            )
        x = x.movedim(self.channel_dim, -1)
        groups = self.codebook.groups
        return x.reshape(*x.shape[:-1], groups, self.dim // groups) if groups > 1 else x

    def _flat(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, G, C] of rows [..., C] or [..., G, D]; sizes said in full because -1 is no size of an empty batch."""
        groups = self.codebook.groups
        return rows.reshape(rows.numel() // self.dim, groups, self.dim // groups)

    def _restore(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.flatten(-2) if self.codebook.groups > 1 else rows
        return rows.movedim(-1, self.channel_dim)

    def forward(self, x: torch.Tensor) -> Quantized:
        """Quantizes x; in training also counts usage and moves EMA codebooks.

        Args:
            x: any float type, `dim` channels at `channel_dim`.

        Returns:
            Quantized(quantized like x, int64 ids without the channel axis (a trailing [G] for groups), 0-dim loss).

        Raises:
            ValueError, TypeError: wrong width or type.
        """
        rows = self._rows(x)
        grouped = self._flat(rows)
        self.codebook.initialise(grouped, self.weights, self.backend)
        options = {
            "metric": self.metric,
            "commitment_weight": self.commitment_weight,
            "codebook_weight": self.codebook_weight,
            "backend": self.backend,
        }
        tables = self.codebook.tables()
        wanted = self.codebook.wanted_statistics()
        if len(tables) == 1:
            (quantized, indices, loss), *statistics = quantize_and_count(rows, tables[0], wanted, **options)
        else:
            options["weights"] = self.weights
            parts = rows.split(self.codebook.widths, dim=-1)
            (quantized, indices, loss), *statistics = shared_quantize_and_count(parts, tables, wanted, **options)
            quantized = torch.cat(quantized, dim=-1)
        if self.training:
            loss = self._with_entropy(loss, [grouped])
            self.codebook.observe(grouped, indices.reshape(grouped.shape[:2]), self.backend, *statistics)
        return Quantized(self._restore(quantized), indices, loss)

    def _with_entropy(self, loss: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """loss + entropy_weight * mean over `rows` (one [N, G, C] a scale) of (mean_n H(p_n) - H(mean_n p_n))."""
        if self.entropy_weight == 0:
            return loss
        tables = self.codebook.tables()
        for part in rows:
            x = part if self.codebook.groups > 1 else part[:, 0].split(self.codebook.widths, dim=-1)
            first, second = ops.entropy_loss(
                x, tables[0] if self.codebook.groups > 1 else tables, metric=self.metric,
                weights=None if self.codebook.groups > 1 else self.weights, temperature=self.entropy_temperature,
                eps=self.entropy_eps, backend=self.backend,
            )  # fmt: skip
            loss = loss + self.entropy_weight / len(rows) * (first - second)
        return loss

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Ids of x, as in `forward`, without changing any state."""
        rows = self._rows(x)
        grouped = self._flat(rows)
        ids = self.codebook.search(grouped, self.weights, self.backend)
        return ids.reshape(rows.shape[:-1])

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """The codes of ids, bit for bit those that `forward` returns in float32; differentiable in the codebooks."""
        return self._restore(self.codebook.rows(indices, self.backend))

    def codebooks(self) -> tuple[torch.Tensor, ...]:
        """The tables as they are stored: T times [K, D_t], or one [G, K, D]."""
        return self.codebook.tables()

    def usage(self) -> float:
        """Share of codes hit since `reset_usage()`, in training only."""
        return self.codebook.usage()

    def perplexity(self) -> float:
        """exp of the entropy of those hits."""
        return self.codebook.perplexity()

    def reset_usage(self) -> None:
        """Starts counting anew."""
        self.codebook.hits.zero_()

    def freeze(self) -> None:
        """Codebooks move no more, by no rule; the commitment loss stays."""
        self.codebook.freeze()
        self.codebook_weight = 0.0

    def extra_repr(self) -> str:
        c = self.codebook
        return f"widths={c.widths}, codebook_size={c.codes}, groups={c.groups}, metric={self.metric!r}, update={c.update!r}"


class VectorQuantizer(_Quantizer):
    """One codebook [K, D], or G of them over G slices of the channels (UniTok's multi-codebook quantization).

    loss = codebook_weight mean((q - sg y)^2) + commitment_weight mean((sg q - y)^2), y and q unit for cosine. The codebook
    learns from the first term alone (`update="gradient"`), or follows its rows (`update="ema"`, no codebook term).

    Args:
        dim: channels of the input, a multiple of `groups`.
        codebook_size: K, per group.
        groups: G.
        metric: "cosine", "l2" or "dot".
        update: "gradient", "ema" or "none".
        commitment_weight: weight of the term that moves the input.
        codebook_weight: weight of the term that moves the codes.
        entropy_weight: adds entropy_weight (mean_n H(p_n) - H(mean_n p_n)) in training.
        entropy_temperature: of p, in units of the distance.
        entropy_eps: inside the logarithm of the mean.
        decay: of the moving averages.
        kmeans_init: the first training batch places the codes.
        dead_code_threshold: codes whose moving average of rows a batch falls below take a row of the batch.
        channel_dim: axis of the channels: -1, or 1 for [B, C, H, W].
        backend: "auto", "native" or "reference".

    Source: 1711.00937; UniTok, 2502.20321.

    Example:
        >>> quantizer = VectorQuantizer(8, 512, channel_dim=1)
        >>> quantized, indices, loss = quantizer(torch.randn(2, 8, 4, 4))
        >>> quantized.shape, indices.shape
        (torch.Size([2, 8, 4, 4]), torch.Size([2, 4, 4]))
        >>> bool((quantizer.decode(indices) == quantized).all())
        True
    """

    def __init__(
        self, dim: int, codebook_size: int, *, groups: int = 1, metric: str = "cosine", update: str = "gradient",
        commitment_weight: float = 0.25, codebook_weight: float = 1.0, entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01, entropy_eps: float = 1e-5, decay: float = 0.99, kmeans_init: bool = False,
        dead_code_threshold: float = 0, channel_dim: int = -1, backend: str = "auto",
    ):  # fmt: skip
        if not isinstance(groups, int) or groups < 1 or not isinstance(dim, int) or dim < 1 or dim % groups:
            raise ValueError(
                f"VectorQuantizer: dim: wanted a positive multiple of groups, got dim {dim!r} and groups {groups!r}"
            )
        super().__init__(
            [dim // groups], codebook_size, groups, None, metric, update, commitment_weight, codebook_weight, entropy_weight,
            entropy_temperature, entropy_eps, decay, kmeans_init, dead_code_threshold, channel_dim, backend,
        )  # fmt: skip


class SharedIndexQuantizer(_Quantizer):
    """TokenFlow's quantizer: T codebooks under one index, argmin_k sum_t weights[t] d_t.

    x carries the tables side by side on `channel_dim`, e.g. 32 semantic and 8 pixel channels for dims=(32, 8).

    Args:
        dims: D_t of the tables.
        codebook_size: K, common to the tables.
        weights: of the distances, 1 each by default; they choose the index and do not enter the loss.

    The other keywords are those of `VectorQuantizer`.

    Source: TokenFlow, arXiv 2412.03069, section 3.1.

    Example:
        >>> quantizer = SharedIndexQuantizer((32, 8), 1024)
        >>> quantizer(torch.randn(5, 40)).indices.shape
        torch.Size([5])
    """

    def __init__(
        self, dims: Sequence[int], codebook_size: int, *, weights: Sequence[float] | None = None, metric: str = "cosine",
        update: str = "gradient", commitment_weight: float = 0.25, codebook_weight: float = 1.0, entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01, entropy_eps: float = 1e-5, decay: float = 0.99, kmeans_init: bool = False,
        dead_code_threshold: float = 0, channel_dim: int = -1, backend: str = "auto",
    ):  # fmt: skip
        if not isinstance(dims, Sequence) or isinstance(dims, str) or not 1 <= len(dims) <= 16:
            raise ValueError(f"SharedIndexQuantizer: dims: wanted 1 to 16 widths, got {dims!r}")
        super().__init__(
            dims, codebook_size, 1, weights, metric, update, commitment_weight, codebook_weight, entropy_weight,
            entropy_temperature, entropy_eps, decay, kmeans_init, dead_code_threshold, channel_dim, backend,
        )  # fmt: skip


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

    def __init__(
        self, quantizer: _Quantizer, scales: Sequence[int | tuple[int, int]], *, phi=None, loss_on: str = "codes",
        normalize_codes: bool | None = None, scale_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        name = "MultiScaleQuantizer"
        if not isinstance(quantizer, _Quantizer) or quantizer.codebook.groups != 1:
            raise ValueError(
                f"{name}: quantizer: wanted a VectorQuantizer or SharedIndexQuantizer with groups = 1, got {quantizer!r}"
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
