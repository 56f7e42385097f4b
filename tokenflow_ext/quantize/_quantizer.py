"""What a quantizer with a codebook does, whatever its tables."""

from collections.abc import Sequence

import torch
from torch import nn

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops._native import BACKENDS
from tokenflow_ext.ops.quantize import quantize_and_count, shared_quantize_and_count
from tokenflow_ext.quantize._codebook import Codebook
from tokenflow_ext.quantize._gradients import GRADIENTS, rotated


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

    def _pass_gradient(self, gradient: str) -> None:
        if gradient not in GRADIENTS:
            raise ValueError(f"{type(self).__name__}: gradient: wanted one of {', '.join(GRADIENTS)}, got {gradient!r}")
        self.gradient = gradient

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
        if self.gradient == "rotation" and torch.is_grad_enabled():
            searched = self.codebook.searched(rows, self.backend)
            quantized = rotated(quantized, searched, self.codebook.widths)
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
