"""What a quantizer with a codebook does, whatever its tables."""

from collections.abc import Sequence

import torch
from torch import nn

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops.quantize import quantize_and_count, shared_quantize_and_count
from tokenflow_ext.quantize import _usage
from tokenflow_ext.quantize._codebook import Codebook
from tokenflow_ext.quantize._gradients import GRADIENTS, rotated
from tokenflow_ext.quantize._masked import masked_quantize


class Quantizer(nn.Module):
    """What VectorQuantizer and SharedIndexQuantizer have in common; a subclass says how x falls into tables.

    Attributes:
        gradient: how `quantized` passes its gradient on, "straight_through" unless a subclass says otherwise.
    """

    gradient = "straight_through"

    def __init__(
        self, widths, codebook_size, groups, weights, metric, update, commitment_weight, codebook_weight, entropy_weight,
        entropy_temperature, entropy_eps, decay, kmeans_init, dead_code_threshold, channel_dim, backend,
    ):  # fmt: skip
        super().__init__()
        name = type(self).__name__
        self.weights = ops._check.table_weights(name, weights, len(widths))
        self.metric, self.backend = metric, ops._check.backend(name, backend)
        self.channel_dim = ops._check.integer(name, "channel_dim", channel_dim)
        self.commitment_weight = ops._check.non_negative(name, "commitment_weight", commitment_weight)
        codebook_weight = ops._check.non_negative(name, "codebook_weight", codebook_weight)
        self.codebook_weight = codebook_weight if update == "gradient" else 0.0
        self.entropy_weight = ops._check.non_negative(name, "entropy_weight", entropy_weight)
        self.entropy_temperature = ops._check.above_zero(name, "entropy_temperature", entropy_temperature)
        self.entropy_eps = ops._check.non_negative(name, "entropy_eps", entropy_eps)
        self.codebook = Codebook(
            name, widths, codebook_size, groups, metric, update, decay, kmeans_init, dead_code_threshold
        )

    def _pass_gradient(self, gradient: str) -> None:
        self.gradient = ops._check.one_of(type(self).__name__, "gradient", gradient, GRADIENTS)

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

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Quantized:
        """Quantizes x; in training also counts usage and moves EMA codebooks.

        Args:
            x: any float type, `dim` channels at `channel_dim`.
            mask: bool, x's shape without the channel axis, False at padding. Padded rows get id -1 and quantized 0; they are
                left out of the loss (its mean is over the other rows), of statistics, k-means, revival and every gradient,
                whatever they hold. Nothing waits for the device, but for `entropy_weight` > 0, whose rows are gathered.

        Returns:
            Quantized(quantized like x, int64 ids without the channel axis (a trailing [G] for groups), 0-dim loss).

        Raises:
            ValueError, TypeError: wrong width, shape or type.
        """
        rows = self._rows(x)
        grouped = self._flat(rows)
        flat_mask = None
        if mask is not None:
            lead = rows.shape[: -2 if self.codebook.groups > 1 else -1]
            ops._check.mask(type(self).__name__, mask, lead, "x's shape without its channels")
            flat_mask = mask.reshape(-1)
        if self.training:  # in eval an exported program would hold an empty block of no_grad, which torch cannot save
            self.codebook.initialise(grouped, self.weights, self.backend, flat_mask)
        with self.codebook.quietly():
            if mask is None:
                quantized, indices, loss, *statistics = self._quantize(rows)
            else:
                (quantized, indices, loss), statistics = masked_quantize(self, rows, mask), []
        if self.gradient == "rotation" and torch.is_grad_enabled():
            quantized = rotated(quantized, self.codebook.searched(rows, self.backend), self.codebook.widths)
        if self.training:
            if self.entropy_weight > 0:
                loss = self._with_entropy(loss, [grouped if mask is None else grouped[flat_mask]])
            counts, sums = statistics or (None, None)
            ids = indices.reshape(grouped.shape[:2])
            with self.codebook.quietly():
                self.codebook.observe(grouped, ids, self.backend, counts, sums, flat_mask)
        if mask is not None:
            indices = indices.masked_fill(~(mask[..., None] if self.codebook.groups > 1 else mask), -1)
        return Quantized(self._restore(quantized), indices, loss)

    def _quantize(self, rows: torch.Tensor) -> tuple:
        """(quantized, ids, loss, counts, sums) of rows as `_rows` gives them."""
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
        return quantized, indices, loss, *statistics

    def _with_entropy(self, loss: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """loss + entropy_weight * mean over `rows` (one [N, G, C] a scale) of (mean_n H(p_n) - H(mean_n p_n))."""
        tables = self.codebook.tables()
        for part in rows:
            x = part if self.codebook.groups > 1 else part[:, 0].split(self.codebook.widths, dim=-1)
            with self.codebook.quietly():
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
        """The codes of ids, bit for bit those that `forward` returns in float32, 0 for -1; differentiable in the codebooks."""
        ops._check.ids("lookup", "indices", indices)
        blank = indices == -1
        rows = self.codebook.rows(indices.masked_fill(blank, 0), self.backend)
        return self._restore(rows.masked_fill(blank[..., None], 0))

    def codebooks(self) -> tuple[torch.Tensor, ...]:
        """The tables as they are stored: T times [K, D_t], or one [G, K, D]."""
        return self.codebook.tables()

    def usage(self, per: str | None = None, *, all_ranks: bool = True) -> float | torch.Tensor:
        """Share of codes hit since `reset_usage()`, in training only.

        Args:
            per: None for the mean over the groups, "group" for each of them, float64 [G] on the CPU.
            all_ranks: of the rows of all ranks of torch.distributed, every one of which has to call this; False for this
                rank's own, which any rank may ask for alone.

        It waits for the device, and also says what nobody else could without waiting: that rows were not finite, and once that
        the codebook collapses (perplexity under codebook.collapse_threshold K after 16 K rows; on the CPU every hundredth
        training step looks, too).
        """
        return self.codebook.usage(self.codebook.hits, self._per(per), all_ranks)

    def perplexity(self, per: str | None = None, *, all_ranks: bool = True) -> float | torch.Tensor:
        """exp of the entropy of those hits; arguments as in `usage`."""
        return self.codebook.perplexity(self.codebook.hits, self._per(per), all_ranks)

    def _per(self, per: str | None) -> str | None:
        return _usage.known_part(type(self).__name__, per, "group")

    def non_finite_rows(self, *, all_ranks: bool = True) -> int:
        """Rows with NaN or inf since `reset_usage()`, in training, counted in each group that they spoil."""
        return self.codebook.non_finite_rows(all_ranks)

    def reset_usage(self) -> None:
        """Starts counting anew."""
        self.codebook.reset_usage()

    def freeze(self) -> None:
        """Codebooks move no more, by no rule; the commitment loss stays."""
        self.codebook.freeze()
        self.codebook_weight = 0.0

    def extra_repr(self) -> str:
        c = self.codebook
        return f"widths={c.widths}, codebook_size={c.codes}, groups={c.groups}, metric={self.metric!r}, update={c.update!r}"
