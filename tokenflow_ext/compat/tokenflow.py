"""TokenFlow's quantizer under its own constructor, returns and state-dict names; and its residual loop around it.

from tokenflow_ext.compat.tokenflow import VectorQuantizer
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext.compat._shared import Table
from tokenflow_ext.ops import _multiscale_check
from tokenflow_ext.ops._check import flag, positive
from tokenflow_ext.ops.multiscale import quantize_with_rows
from tokenflow_ext.quantize._codebook import recomputing
from tokenflow_ext.quantize._precision import FullPrecision
from tokenflow_ext.quantize._ranks import all_reduce
from tokenflow_ext.quantize.multiscale import kept_scales

WINDOW = 131072
"""Ids that the usage window remembers."""
TEMPERATURE, EPS = 0.01, 1e-5
"""Of the entropy loss."""


def _mean_over_scales(values: Tensor, cells: Sequence[int]) -> Tensor:
    """The plain mean over scales of the mean of [B, L] over each scale's rows; 0 for an empty batch."""
    return sum(part.sum() / max(part.numel(), 1) for part in values.split(cells, dim=1)) / len(cells)


class VectorQuantizer(FullPrecision):
    """One index over a semantic and a pixel codebook: argmin_k |zs - es_k|^2 + |zp - ep_k|^2, halves unit apart.

    vq = mean((q - sg u)^2), commit = beta mean((sg q - u)^2) over all channels of the searched rows u and their codes q;
    entropy = entropy_loss_ratio (mean_n H(p_n) - H(mean_n p_n)), p = softmax(-d / 0.01). `z_q` is q with d z_q / d u = 1.

    State dict: `embedding_vqkd.weight` [K, D_0], `embedding_vqgan.weight` [K, D_1], `codebook_used` [131072].

    Args:
        n_e: K.
        e_dim: the channels, sum of split, or one of the two widths; `split` decides.
        beta: weight of the commitment.
        entropy_loss_ratio: weight of the entropy loss; 0 computes none.
        l2_norm: unit rows and codes. False searches raw ones by squared distance, which the original cannot.
        show_usage: whether a window of recent ids is kept in training.
        split: (D_0, D_1), semantic and pixel width.
        kmeans: False; True never worked in the original.
        quirks: `usage` as the original has it: a float, distinct values of this rank's window of zeros (code 0 counts before
            it was hit), 0 in eval. By default the window starts empty (one that is loaded goes on as it is), ranks are joined
            and `usage` is a 0-dim tensor.
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: a sentence with class, argument, wanted, got.

    Source: TokenFlow, arXiv 2412.03069, section 3.1.

    Example:
        >>> from tokenflow_ext.compat.tokenflow import VectorQuantizer
        >>> quantizer = VectorQuantizer(64, 9, 0.25, 0.0, True, True, [6, 3])
        >>> z_q, (vq, commit, *_), (perplexity, encodings, indices) = quantizer(torch.randn(2, 9, 4, 4))
        >>> z_q.shape, indices.shape
        (torch.Size([2, 9, 4, 4]), torch.Size([32]))
    """

    def __init__(
        self, n_e: int, e_dim: int, beta: float, entropy_loss_ratio: float, l2_norm: bool, show_usage: bool,
        split: Sequence[int], kmeans: bool = False, *, quirks: bool = False, backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        name = type(self).__name__
        if isinstance(split, str) or not isinstance(split, Sequence) or len(split) != 2:
            raise ValueError(f"{name}: split: wanted two widths (semantic, pixel), got {split!r}")
        if flag(name, "kmeans", kmeans):
            raise ValueError(
                f"{name}: kmeans: wanted False (quantize.SharedIndexQuantizer(kmeans_init=True, update='ema') does it), "
                f"got {kmeans!r}"
            )
        self.n_e, self.split = positive(name, "n_e", n_e), [positive(name, "split", w) for w in split]
        if positive(name, "e_dim", e_dim) not in (sum(self.split), *self.split):
            raise ValueError(f"{name}: e_dim: wanted {sum(self.split)}, the sum of split {self.split}, got {e_dim}")
        self.e_dim, self.beta = e_dim, ops._check.non_negative(name, "beta", beta)
        self.entropy_loss_ratio = ops._check.non_negative(name, "entropy_loss_ratio", entropy_loss_ratio)
        self.l2_norm, self.show_usage = flag(name, "l2_norm", l2_norm), flag(name, "show_usage", show_usage)
        self.quirks, self.backend = flag(name, "quirks", quirks), ops._check.backend(name, backend)
        self.embedding_vqkd = Table(n_e, self.split[0], backend)
        self.embedding_vqgan = Table(n_e, self.split[1], backend)
        for table in (self.embedding_vqkd, self.embedding_vqgan):
            nn.init.uniform_(table.weight, -1 / n_e, 1 / n_e)
            if l2_norm:
                table.weight.data = ops.normalize_rows(table.weight.detach(), backend="reference")
        self.register_buffer("codebook_used", torch.full((WINDOW,), 0.0 if quirks else -1.0))

    @property
    def metric(self) -> str:
        """Of the search."""
        return "cosine" if self.l2_norm else "l2"

    def codebooks(self) -> tuple[Tensor, Tensor]:
        """The two tables as they are stored."""
        return self.embedding_vqkd.weight, self.embedding_vqgan.weight

    def forward(self, z: Tensor) -> tuple[Tensor, tuple, tuple]:
        """Quantizes z [B, C, h, w].

        Returns:
            z_q [B, C, h, w]; (vq, commit, entropy, usage, d_sem_norm, d_pix_norm), all but `usage` None in eval, where
            d_*_norm = mean_n sum_k d^2 are for logging and carry no gradient; (perplexity of this call's codes, None in
            place of the N x K one-hot, ids [B h w], row major).

        Raises:
            ValueError, TypeError: wrong width or type.
        """
        name = type(self).__name__
        _multiscale_check.maps(name, z)
        self._has_channels(name, z)
        tables = [t.detach() for t in self.codebooks()]
        parts = z.movedim(1, -1).split(self.split, dim=-1)
        options = {"metric": self.metric, "commitment_weight": self.beta, "codebook_weight": 0.0}
        quantized, indices, commit = ops.shared_quantize(parts, tables, **options, backend=self.backend)
        ids = indices.reshape(1, indices.numel())
        rows = z.movedim(1, -1).reshape(1, indices.numel(), z.shape[1])
        losses = self._losses(commit, rows, ids, [indices.numel()], rows)
        return torch.cat(quantized, dim=-1).movedim(-1, 1), losses, (self._perplexity(ids), None, ids[0])

    def _has_channels(self, name: str, z: Tensor) -> None:
        if z.shape[1] != sum(self.split):
            raise ValueError(f"{name}: z: wanted {sum(self.split)} channels, as many as the tables, got {z.shape[1]}")

    def _losses(self, commit: Tensor, rows: Tensor, ids: Tensor, cells: Sequence[int], with_gradient: Tensor) -> tuple:
        """The tuple of losses of rows [B, L, C] and ids [B, L] that fall into scales of `cells`; `with_gradient` are the
        rows for the entropy."""
        usage = self._usage(ids, rows, cells)
        if not self.training:
            return None, None, None, usage, None, None
        rows = rows.detach()
        with torch.autocast(commit.device.type, enabled=False):
            entropy = commit.new_zeros(())
            if self.entropy_loss_ratio > 0:
                parts = with_gradient.split(cells, dim=1)
                entropy = sum(self._entropy(part) for part in parts) * (self.entropy_loss_ratio / len(cells))
            vq = self._codebook_loss(rows, ids, cells)
            return vq, commit, entropy, usage, *self._distance_square_sums(rows, cells)

    def _searched(self, parts: Sequence[Tensor]) -> list[Tensor]:
        if not self.l2_norm:
            return list(parts)
        return [ops.normalize_rows(p, backend=self.backend) for p in parts]

    def _codebook_loss(self, rows: Tensor, ids: Tensor, cells: Sequence[int]) -> Tensor:
        """mean((q - sg u)^2): a gather and its scatter-add, because the search's own loss cannot tell its two terms apart."""
        wide = ops._native.real(rows, *self.codebooks())
        u = torch.cat(self._searched(rows.to(wide).split(self.split, dim=-1)), dim=-1)
        codes = ops.shared_lookup(ids, self.codebooks(), backend=self.backend)
        q = torch.cat(self._searched([c.to(wide) for c in codes]), dim=-1)
        error = torch.where(rows.isfinite().all(-1, keepdim=True), q - u, 0.0)
        return _mean_over_scales(error.square().sum(-1), cells) / rows.shape[-1]

    def _entropy(self, rows: Tensor) -> Tensor:
        first, second = ops.entropy_loss(
            rows.split(self.split, dim=-1), self.codebooks(), metric=self.metric, temperature=TEMPERATURE, eps=EPS,
            backend=self.backend,
        )  # fmt: skip
        return first - second

    @torch.no_grad()
    def _distance_square_sums(self, rows: Tensor, cells: Sequence[int]) -> list[Tensor]:
        """mean_n sum_k d_nk^2 of either table from its D x D Gram matrix, in place of N x K."""
        wide, sums = ops._native.real(rows, *self.codebooks()), []
        good = rows.isfinite().all(-1)
        parts = self._searched(rows.to(wide).split(self.split, dim=-1))
        for y, table in zip(parts, self._searched([t.to(wide) for t in self.codebooks()])):
            # d = a + b_k - 2 y.e_k with a = |y|^2, b_k = |e_k|^2, squared and summed over k.
            a, b = y.square().sum(-1), table.square().sum(-1)
            d = len(table) * a.square() + 2 * a * b.sum() + b.square().sum()
            d = d - 4 * a * (y @ table.sum(0)) - 4 * (y @ (b @ table)) + 4 * ((y @ (table.T @ table)) * y).sum(-1)
            sums.append(_mean_over_scales(torch.where(good, d, 0.0), cells))
        return sums

    @torch.no_grad()
    def _usage(self, ids: Tensor, rows: Tensor, cells: Sequence[int]):
        """Share of codes in the window after it took these ids; with quirks the mean over scales that come one by one."""
        moves = self.training and self.show_usage and not recomputing()
        if self.quirks:
            parts = ids.split(cells, dim=1) if moves else ()
            return sum(self._window_share(part.reshape(-1)) for part in parts) / len(cells)
        if moves:
            self._push(torch.where(rows.isfinite().all(-1), ids, -1).reshape(-1))
        window = self.codebook_used.to(torch.int64)
        hit = torch.zeros(self.n_e + 1, dtype=torch.int64, device=window.device)
        hit.scatter_(0, window.clamp(-1, self.n_e - 1) + 1, 1)
        if moves:
            all_reduce(hit)
        return (hit.narrow(0, 1, self.n_e) > 0).float().mean()

    def _window_share(self, ids: Tensor) -> float:
        if ids.numel() > WINDOW:
            raise ValueError(
                f"{type(self).__name__}: z: wanted at most {WINDOW} rows a call with quirks=True, got {ids.numel()}"
            )
        self._push(ids)
        return len(self.codebook_used.clamp_min(0).unique()) / self.n_e

    def _push(self, ids: Tensor) -> None:
        both = torch.cat([self.codebook_used, ids.to(self.codebook_used.dtype)])
        self.codebook_used.copy_(both.narrow(0, ids.numel(), WINDOW))

    @torch.no_grad()
    def _perplexity(self, ids: Tensor) -> Tensor:
        share = torch.zeros(self.n_e, dtype=torch.int64, device=ids.device)
        share = share.scatter_add_(0, ids.reshape(-1), torch.ones_like(ids).reshape(-1)) / max(ids.numel(), 1)
        return torch.exp(torch.special.entr(share).sum())

    def get_codebook_entry(
        self, indices: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> Tensor:
        """Codes of ids as the model decodes them, unit per table.

        Args:
            indices: int64 ids [...].
            shape: (B, C, h, w) with channel_first, (B, h, w, C) without; None keeps the ids' own shape.
            channel_first: which of them.

        Returns:
            [..., C], or what `shape` says. Differentiable in the codebooks.
        """
        tables = ops.shared_lookup(indices, self.codebooks(), backend=self.backend)
        codes = torch.cat(self._searched(tables), dim=-1)
        if shape is None:
            return codes
        b, c, h, w = shape if channel_first else (shape[0], shape[3], shape[1], shape[2])
        codes = codes.reshape(b, h, w, c)
        return codes.movedim(-1, 1).contiguous() if channel_first else codes

    def extra_repr(self) -> str:
        return f"n_e={self.n_e}, split={self.split}, beta={self.beta}, l2_norm={self.l2_norm}, quirks={self.quirks}"


class MultiScaleVectorQuantizer(VectorQuantizer):
    """TokenFlow's residual loop around its quantizer, in one call; the model's encode() and decode_code() for features.

    r = h; for every scale: q = code(down(r)), f_hat += up(q), r -= sg(up(q)). Losses are plain means over the scales.

    State dict and arguments: `VectorQuantizer`, and

    Args:
        scales: grids of the residuals, coarse to fine: ints or (h, w).
        scale_drop: probability that a training batch goes without one of scales 2..S; its ids are then missing from the
            list, as in the original, which has 0.1.

    Source: TokenFlow, arXiv 2412.03069, section 3.1.

    Example:
        >>> from tokenflow_ext.compat.tokenflow import MultiScaleVectorQuantizer
        >>> quantizer = MultiScaleVectorQuantizer(64, 9, 0.25, 0.0, True, True, [6, 3], scales=(1, 2, 4))
        >>> f_hat, losses, (_, _, indices) = quantizer(torch.randn(2, 9, 4, 4))
        >>> f_hat.shape, indices.shape, bool((quantizer.decode_code(indices) == f_hat).all())
        (torch.Size([2, 9, 4, 4]), torch.Size([2, 21]), True)
    """

    def __init__(self, *args, scales: Sequence[int | tuple[int, int]], scale_drop: float = 0.0, **options):
        super().__init__(*args, **options)
        name = type(self).__name__
        self.scales = _multiscale_check.grids(name, scales)
        self.scale_drop = ops._check.share(name, "scale_drop", scale_drop)

    def forward(self, z: Tensor) -> tuple[Tensor, tuple, tuple]:
        """Quantizes features z [B, C, H, W]; returns as `VectorQuantizer.forward`, with ids [B, L] of the scales used."""
        name = type(self).__name__
        _multiscale_check.maps(name, z)
        self._has_channels(name, z)
        scales = self._used()
        common = {"scales": scales, "metric": self.metric, "weights": None, "phi": None, "normalize_codes": None}
        common |= {"commitment_weight": self.beta, "codebook_weight": 0.0, "loss_on": "codes", "backend": self.backend}
        tables = [t.detach() for t in self.codebooks()]
        (f_hat, indices, commit), rows = quantize_with_rows(z, tables, **common, with_rows=self.training)
        followed = rows
        if self.training and self.entropy_loss_ratio > 0:
            followed = ops.multiscale_rows(z, indices, tables, **common)
        losses = self._losses(commit, rows, indices, [h * w for h, w in scales], followed)
        return f_hat, losses, (self._perplexity(indices), None, indices)

    def _used(self) -> list[tuple[int, int]]:
        """The scales of this batch."""
        return [self.scales[s] for s in kept_scales(len(self.scales), self.scale_drop if self.training else 0.0)]

    def _place(self) -> dict:
        size = (max(h for h, _ in self.scales), max(w for _, w in self.scales))
        return {"scales": self.scales, "size": size, "metric": self.metric, "backend": self.backend}

    def decode_code(self, code_b: Tensor) -> Tensor:
        """f_hat [B, C, H, W] of ids [B, any whole-scale prefix].

        Raises:
            ValueError: a length that is not whole scales.
        """
        return ops.multiscale_decode(code_b, self.codebooks(), **self._place())

    def inputs(self, indices: Tensor, *, refine: int | None = None) -> Tensor:
        """What TokenFlow's language model reads after a prefix of ids, [B, rows of scales 2.., C]: `ops.multiscale_inputs`,
        rule "chain"."""
        return ops.multiscale_inputs(indices, self.codebooks(), rule="chain", refine=refine, **self._place())
