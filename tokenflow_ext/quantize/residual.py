"""Plain residual vector quantization: level after level, each codes what the ones before left over."""

import torch
from torch import Tensor

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops._native import real
from tokenflow_ext.quantize._compound import Compound
from tokenflow_ext.quantize._gradients import straight_through
from tokenflow_ext.quantize._losses import two_sided
from tokenflow_ext.quantize.vector import VectorQuantizer


class ResidualQuantizer(Compound):
    """R ids a row: each level takes the code nearest to what the levels before left over.

        r_1 = x;   i_d = argmin_k |r_d - E_d,k|^2;   r_{d+1} = r_d - E_d,i_d;   f_d = sum_{t <= d} E_t,i_t
        loss = mean_d [codebook_weight mean((f_d - sg x)^2) + commitment_weight mean((sg f_d - x)^2)]

    quantized = f_R, straight-through. In training plus entropy_weight mean_d (mean_n H(p_n) - H(mean_n p_n)).

    Args:
        dim: channels of the input.
        codebook_size: K, per level.
        depth: R.
        shared: one codebook for all levels (RQ-VAE), or one each (SoundStream).
        quantizer_dropout: probability that a training batch stops at a level drawn from 1 .. R; ids after it are -1.
        options: keywords of VectorQuantizer but for groups, metric (l2), normalize_mean and gradient.

    Raises:
        ValueError, TypeError: an argument that does not fit, in a sentence.

    Source: RQ-VAE, arXiv 2203.01941; one codebook a level and quantizer dropout: SoundStream, arXiv 2107.03312.

    Example:
        >>> quantizer = ResidualQuantizer(8, 64, depth=4)
        >>> quantized, indices, loss = quantizer(torch.randn(5, 8))
        >>> indices.shape, bool((quantizer.decode(indices) == quantized).all()), quantizer.decode(indices[:, :2]).shape
        (torch.Size([5, 4]), True, torch.Size([5, 8]))
    """

    def __init__(
        self, dim: int, codebook_size: int, depth: int, *, shared: bool = False, quantizer_dropout: float = 0.0, **options
    ):  # fmt: skip
        name = "ResidualQuantizer"
        ops._check.positive(name, "depth", depth)
        quantizer_dropout = ops._check.share(name, "quantizer_dropout", quantizer_dropout)
        for argument in ("groups", "metric", "normalize_mean", "gradient"):
            if argument in options:
                raise TypeError(f"{name}: {argument}: wanted no such keyword, got {options[argument]!r}")
        made = 1 if ops._check.flag(name, "shared", shared) else depth
        super().__init__(VectorQuantizer(dim, codebook_size, metric="l2", **options) for _ in range(made))
        self.depth, self.shared, self.quantizer_dropout = depth, shared, quantizer_dropout

    @property
    def dim(self) -> int:
        """Channels of the input."""
        return self.quantizers[0].dim

    @property
    def channel_dim(self) -> int:
        """Axis of the channels."""
        return self.quantizers[0].channel_dim

    def _level(self, d: int) -> VectorQuantizer:
        return self.quantizers[0 if self.shared else d]

    def _depth(self) -> int:
        """How many levels this batch uses."""
        if self.training and self.quantizer_dropout > 0 and float(torch.rand(())) < self.quantizer_dropout:
            return 1 + int(torch.randint(self.depth, ()))
        return self.depth

    @torch.no_grad()
    def _search(self, x: Tensor, depth: int, initialise: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Rows [N, 1, C] and ids [N, 1] of the first levels, for x [N, 1, C]."""
        rows, ids = [], []
        for d in range(depth):
            level = self._level(d)
            if initialise:
                level.codebook.initialise(x, level.weights, level.backend)
            rows.append(x)
            ids.append(level.codebook.search(x, level.weights, level.backend))
            x = x - level.codebook.rows(ids[-1], level.backend)
        return rows, ids

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes x; in training also counts usage and moves EMA codebooks.

        Args:
            x: any float type, `dim` channels at `channel_dim`.

        Returns:
            Quantized(quantized like x, int64 ids [..., R], 0-dim loss). Rows with NaN or inf get ids 0 and NaN, and are left
            out of loss, usage, averages and gradients.

        Raises:
            ValueError, TypeError: wrong width or type.
        """
        first, depth = self.quantizers[0], self._depth()
        shaped = first._rows(x)
        flat = first._flat(shaped.to(real(shaped, *first.codebooks())))
        good = flat.isfinite().all(-1)
        with first.codebook.quietly():
            rows, ids = self._search(flat.detach(), depth, self.training)
        f, loss = torch.zeros_like(flat), flat.new_zeros(())
        for d in range(depth):
            f = f + self._level(d).codebook.rows(ids[d], first.backend)
            loss = loss + two_sided(first, f, flat, good.unsqueeze(-1))
        loss = loss / (depth * max(ops._check.count(flat.shape), 1))
        if self.training:
            loss = self._observe(rows, ids, loss)
        blank = [torch.full_like(ids[0], -1)] * (self.depth - depth)
        indices = torch.cat([*ids, *blank], dim=1).reshape(*shaped.shape[:-1], self.depth)
        quantized = torch.where(good.unsqueeze(-1), f, torch.nan).reshape(shaped.shape)
        return Quantized(first._restore(straight_through(shaped, quantized)), indices, loss)

    def _observe(self, rows: list[Tensor], ids: list[Tensor], loss: Tensor) -> Tensor:
        """Counts a training batch and moves the codebooks by it; the loss with the entropy term."""
        if self.quantizers[0].entropy_weight > 0:
            terms = [self._level(d)._with_entropy(loss.new_zeros(()), [r]) for d, r in enumerate(rows)]
            loss = loss + sum(terms) / len(terms)
        if self.shared:
            rows, ids = [torch.cat(rows)], [torch.cat(ids)]
        for level, level_rows, level_ids in zip(self.quantizers, rows, ids):
            with level.codebook.quietly():
                level.codebook.observe(level_rows, level_ids, level.backend)
        return loss

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Ids [..., R] of x, as in `forward`, without changing any state."""
        first = self.quantizers[0]
        shaped = first._rows(x)
        flat = first._flat(shaped.to(real(shaped, *first.codebooks())))
        ids = self._search(flat, self.depth, False)[1]
        return torch.cat(ids, dim=1).reshape(*shaped.shape[:-1], self.depth)

    def decode(self, indices: Tensor) -> Tensor:
        """f_r of ids [..., r] of the first r levels, 0 <= r <= R; differentiable in the codebooks. An id of -1 adds nothing.

        Raises:
            ValueError: more levels than there are, ids outside a table.
        """
        ops._check.ids("ResidualQuantizer.decode", "indices", indices)
        if indices.dim() < 1 or indices.shape[-1] > self.depth:
            raise ValueError(
                f"ResidualQuantizer.decode: indices: wanted [..., r] with r <= {self.depth}, got {list(indices.shape)}"
            )
        first = self.quantizers[0]
        f = first.codebooks()[0].new_zeros((*indices.shape[:-1], first.dim))
        for d, ids in enumerate(indices.unbind(-1)):
            left = ids == -1
            step = self._level(d).codebook.rows(ids.masked_fill(left, 0), first.backend)
            f = f + step.masked_fill(left.unsqueeze(-1), 0.0)
        return first._restore(f)
