"""VAR's multi-scale residual quantizer under its own constructor, returns, routes and state-dict names.

from tokenflow_ext.compat.var import VectorQuantizer2
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext._scales import grids, pair
from tokenflow_ext.compat._shared import WARM, Table, count, rates
from tokenflow_ext.ops import _multiscale_check
from tokenflow_ext.ops._check import flag, positive
from tokenflow_ext.ops.multiscale import quantize_with_rows
from tokenflow_ext.quantize._codebook import recomputing
from tokenflow_ext.quantize._precision import FullPrecision
from tokenflow_ext.quantize._ranks import distributed, ranks

NAME = "VectorQuantizer2"
USED = 0.08
"""A code is in use from this part of an even share."""

Maps = list[Tensor]


class Phi(FullPrecision, nn.Conv2d):
    """phi(h) = (1 - ratio) h + ratio (conv3x3(h) + bias): holds `weight` [C, C, 3, 3] and `bias` [C]."""

    def __init__(self, channels: int, ratio: float, backend: str):
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.resi_ratio, self.backend = ratio, backend

    def forward(self, h: Tensor) -> Tensor:
        """phi of maps [B, C, H, W]."""
        return _raise(
            h, h.shape[2:], (self.weight.unsqueeze(0), self.bias.unsqueeze(0), self.resi_ratio, [0]), self.backend
        )


class PhiShared(nn.Module):
    """One phi for every scale: `qresi`."""

    def __init__(self, phi: nn.Module):
        super().__init__()
        self.qresi = phi


class PhiPartiallyShared(nn.Module):
    """Some phi for neighbouring scales: `qresi_ls.{0..}`."""

    def __init__(self, phis: Sequence[nn.Module]):
        super().__init__()
        self.qresi_ls = nn.ModuleList(phis)


class PhiNonShared(nn.ModuleList):
    """A phi for every scale: `{0..}`."""


def assignment(phis: int, scales: int) -> list[int]:
    """Which phi each scale takes: that of the nearest tick to s / (S - 1), in float64, the first on a tie; S = 1 takes phi 0.

    The arithmetic decides ties (scales 3 and 8 of VAR's ten are such): ticks are i * step + first, the last exact.

    Example:
        >>> assignment(4, 10)
        [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    """
    first = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    last = 1 - first
    step = (last - first) / (phis - 1) if phis > 1 else 0.0
    ticks = [i * step + first for i in range(phis)]
    if phis > 1:
        ticks[-1] = last
    if scales == 1:
        return [0]
    return [min(range(phis), key=lambda i: abs(ticks[i] - s / (scales - 1))) for s in range(scales)]


def _raise(h: Tensor, size, phi, backend: str) -> Tensor:
    """phi(up(h)) of maps [B, C, h, w] at `size`: `multiscale_decode`, whose codes are the pixels of h."""
    batch, channels, *grid = h.shape
    if batch == 0:
        return h.new_zeros(0, channels, *size)
    pixels = h.movedim(1, -1).reshape(-1, channels)
    ids = torch.arange(len(pixels), device=h.device).view(batch, -1)
    place = {"scales": [tuple(grid)], "size": tuple(size), "metric": "l2", "phi": phi, "backend": backend}
    return ops.multiscale_decode(ids, [pixels], **place)


def _area(maps: Tensor, grid: tuple[int, int], backend: str) -> Tensor:
    """down(maps) [B, C, h, w]: the rows that the first scale of `multiscale_rows` is searched for."""
    ids = torch.zeros(len(maps), grid[0] * grid[1], dtype=torch.int64, device=maps.device)
    none = maps.new_zeros(1, maps.shape[1])
    rows = ops.multiscale_rows(maps, ids, [none], scales=[grid], metric="l2", backend=backend)
    return rows.unflatten(1, grid).movedim(-1, 1)


class VectorQuantizer2(FullPrecision):
    """Residual quantization over scales with one codebook: r = f; for s: h = phi_s(up(E[i_s])), f_hat += h, r -= h.

    i_s is the code nearest to down(r): by squared distance, or by cosine with using_znorm, which still adds raw codes. The
    last scale is searched at the map's own size. loss = mean_s (beta mse(sg f_hat_s, f) + mse(f_hat_s, sg f));
    d f_hat / df = 1.

    State dict: `embedding.weight` [V, C], `ema_vocab_hit_SV` [S, V], and `quant_resi.qresi.{weight, bias}` (one phi),
    `quant_resi.qresi_ls.{p}.{weight, bias}` (partially shared) or `quant_resi.{s}.{weight, bias}` (one a scale).

    Args:
        vocab_size: V.
        Cvae: C.
        using_znorm: cosine in place of squared distance.
        beta: weight of the commitment.
        default_qresi_counts: how many phi with share_quant_resi=0; 0 means one a scale.
        v_patch_nums: the scales, coarse to fine: ints or (h, w).
        quant_resi: its absolute value is phi's ratio; no phi at 0.
        share_quant_resi: 0 a phi for every scale, 1 one for all, P > 1 that many, shared by neighbours.
        quirks: usage as the original has it: the buffer moves only under torch.distributed, counts scales in place of
            steps, and every scale is held to the finest one's threshold. By default it moves in training, steps are steps,
            and a code is in use from 8 % of an even share of its own scale's tokens.
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: a sentence with class, argument, wanted, got.

    Source: VAR, arXiv 2404.02905, algorithms 1 and 2.

    Example:
        >>> from tokenflow_ext.compat.var import VectorQuantizer2
        >>> quantizer = VectorQuantizer2(64, 8, False, v_patch_nums=(1, 2, 4))
        >>> f_hat, usages, loss = quantizer(torch.randn(2, 8, 4, 4), ret_usages=True)
        >>> ids = quantizer.f_to_idxBl_or_fhat(torch.randn(2, 8, 4, 4), to_fhat=False)
        >>> f_hat.shape, len(usages), [i.shape[1] for i in ids], quantizer.idxBl_to_var_input(ids).shape
        (torch.Size([2, 8, 4, 4]), 3, [1, 4, 16], torch.Size([2, 20, 8]))
    """

    def __init__(
        self, vocab_size: int, Cvae: int, using_znorm: bool, beta: float = 0.25, default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int | tuple[int, int]] | None = None, quant_resi: float = 0.5, share_quant_resi: int = 4,
        *, quirks: bool = False, backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        self.vocab_size, self.Cvae = positive(NAME, "vocab_size", vocab_size), positive(NAME, "Cvae", Cvae)
        self.using_znorm, self.beta = (
            flag(NAME, "using_znorm", using_znorm),
            ops._check.non_negative(NAME, "beta", beta),
        )
        if v_patch_nums is None:
            raise ValueError(f"{NAME}: v_patch_nums: wanted the scales, coarse to fine, got None")
        self.scales = grids(NAME, v_patch_nums, "v_patch_nums")
        self.v_patch_nums = tuple(v_patch_nums)
        self.quant_resi_ratio = ops._check.non_negative(
            NAME, "quant_resi", abs(ops._check.number(NAME, "quant_resi", quant_resi))
        )
        for key, value in (("default_qresi_counts", default_qresi_counts), ("share_quant_resi", share_quant_resi)):
            ops._check.non_negative(NAME, key, ops._check.integer(NAME, key, value))
        self.quirks, self.backend = flag(NAME, "quirks", quirks), ops._check.backend(NAME, backend)

        def phi() -> nn.Module:
            return Phi(Cvae, self.quant_resi_ratio, backend) if self.quant_resi_ratio > 1e-6 else nn.Identity()

        if share_quant_resi == 0:
            self.quant_resi = PhiNonShared([phi() for _ in range(default_qresi_counts or len(self.scales))])
        elif share_quant_resi == 1:
            self.quant_resi = PhiShared(phi())
        else:
            self.quant_resi = PhiPartiallyShared([phi() for _ in range(share_quant_resi)])
        self.embedding = Table(vocab_size, Cvae, backend)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.scales), vocab_size))
        self.register_buffer("record_hit", torch.zeros((), dtype=torch.int64), persistent=False)

    def eini(self, eini: float) -> None:
        """Draws the codebook: eini > 0 truncated normal of that standard deviation, eini < 0 uniform +- |eini| / V."""
        if eini > 0:
            nn.init.trunc_normal_(self.embedding.weight, std=eini)
        elif eini < 0:
            bound = abs(eini) / self.vocab_size
            nn.init.uniform_(self.embedding.weight, -bound, bound)

    @property
    def metric(self) -> str:
        """Of the search."""
        return "cosine" if self.using_znorm else "l2"

    def phis(self) -> list[nn.Module]:
        """The phi, in the order of their numbers."""
        return [self.quant_resi.qresi] if isinstance(self.quant_resi, PhiShared) else list(
            getattr(self.quant_resi, "qresi_ls", self.quant_resi)
        )  # fmt: skip

    def _phi(self, scales: int):
        """phi of the ops for a list of that many scales."""
        phis = self.phis()
        if not isinstance(phis[0], Phi):
            return None
        weight, bias = torch.stack([p.weight for p in phis]), torch.stack([p.bias for p in phis])
        return weight, bias, self.quant_resi_ratio, assignment(len(phis), scales)

    def _options(self, scales: Sequence[tuple[int, int]]) -> dict:
        """Keywords that the multi-scale ops have in common."""
        return {
            "scales": list(scales), "metric": self.metric, "phi": self._phi(len(scales)), "normalize_codes": False,
            "backend": self.backend,
        }  # fmt: skip

    def _maps(self, name: str, f: Tensor) -> None:
        _multiscale_check.maps(NAME, f)
        if f.shape[1] != self.Cvae:
            raise ValueError(f"{NAME}: {name}: wanted [B, {self.Cvae}, H, W], got {list(f.shape)}")

    def _quantize(self, f: Tensor, scales: Sequence[tuple[int, int]], with_rows: bool):
        options = {**self._options(scales), "weights": None, "loss_on": "accumulated", "with_rows": with_rows}
        return quantize_with_rows(
            f, [self.embedding.weight], **options, commitment_weight=self.beta, codebook_weight=1.0
        )

    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """Quantizes f [B, C, H, W].

        Returns:
            f_hat [B, C, H, W]; with ret_usages the percentage of codes in use for each scale (the device is waited for),
            else None; the loss, 0-dim.

        Raises:
            ValueError, TypeError: wrong width or type, or a scale larger than the map.
        """
        self._maps("f_BChw", f_BChw)
        size = (f_BChw.shape[2], f_BChw.shape[3])
        scales = [*self.scales[:-1], size]
        (f_hat, indices, loss), rows = self._quantize(f_BChw, scales, with_rows=self.training)
        if self.training:
            self._record(indices, rows.detach(), scales)
        return f_hat, self._usages(len(f_BChw) * size[0] * size[1]) if ret_usages else None, loss

    @torch.no_grad()
    def _record(self, indices: Tensor, rows: Tensor, scales: Sequence[tuple[int, int]]) -> None:
        """Moves `ema_vocab_hit_SV` by the ids [B, L] of rows [B, L, C]."""
        if recomputing() or (self.quirks and not distributed()):
            return
        first = [torch.full((h * w,), s * self.vocab_size, device=indices.device) for s, (h, w) in enumerate(scales)]
        places = (indices + torch.cat(first)).reshape(-1, 1)
        hits = count(places, rows.flatten(0, 1).unsqueeze(1), len(scales) * self.vocab_size, ranks=True)
        hits = hits.view_as(self.ema_vocab_hit_SV).to(self.ema_vocab_hit_SV.dtype)
        steps = self.record_hit.expand(len(scales))
        if self.quirks:
            steps = steps + torch.arange(len(scales), device=indices.device)
        # A batch without rows leaves everything as it is.
        some = hits.any()
        self.ema_vocab_hit_SV.lerp_(hits, torch.where(some, rates(steps), 0.0).unsqueeze(1).to(hits.dtype))
        self.record_hit += some * (len(scales) if self.quirks else 1)

    def _usages(self, rows: int) -> list[float]:
        hits = self.ema_vocab_hit_SV
        if self.quirks:
            used = hits >= ranks()[1] * rows / self.vocab_size * USED
        else:
            used = (hits >= hits.sum(-1, keepdim=True) / self.vocab_size * USED) & (hits > 0)
        return (100 * used.float().mean(-1)).tolist()

    def _load_from_state_dict(self, state_dict, prefix, *args, **options):
        key = f"{prefix}ema_vocab_hit_SV"
        if key in state_dict and state_dict[key].shape != self.ema_vocab_hit_SV.shape:
            state_dict[key] = self.ema_vocab_hit_SV.clone()  # of another list of scales: ours starts anew
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        self.resume()

    def resume(self) -> None:
        """A counter that was loaded is past its warm-up; the original, and quirks, start its count of steps anew."""
        if not self.quirks and not self.record_hit.is_meta:
            self.record_hit.fill_(WARM if bool(self.ema_vocab_hit_SV.any()) else 0)

    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[int | tuple[int, int]] | None = None
    ) -> Maps:
        """Encodes f [B, C, H, W]: ids [B, h w] of every scale, or the running f_hat [B, C, H, W] after every scale.

        Args:
            f_BChw: features; they get no gradient.
            to_fhat: maps in place of ids.
            v_patch_nums: other scales; the last is the map's size.

        Raises:
            ValueError: a last scale that is not (H, W).
        """
        self._maps("f_BChw", f_BChw)
        scales = self.scales if v_patch_nums is None else grids(NAME, v_patch_nums, "v_patch_nums")
        size = (f_BChw.shape[2], f_BChw.shape[3])
        if scales[-1] != size:
            raise ValueError(f"{NAME}: v_patch_nums: wanted the map's {size} as the last scale, got {scales[-1]}")
        with torch.no_grad():
            indices = self._quantize(f_BChw, scales, with_rows=False)[0].indices
        ids = list(indices.split([h * w for h, w in scales], dim=1))
        if not to_fhat:
            return ids
        codes = [self.embedding(i).movedim(-1, 1).unflatten(-1, grid) for i, grid in zip(ids, scales)]
        return list(accumulate(self._contributions(codes, scales, size)))

    def _contributions(self, maps: Sequence[Tensor], scales: Sequence[tuple[int, int]], size) -> Maps:
        """phi_s(up(h_s)) of maps [B, C, h, w], the first of `scales`, at `size`."""
        return [_raise(h, size, self._phi_of(s, len(scales)), self.backend) for s, h in enumerate(maps)]

    def _phi_of(self, s: int, scales: int):
        """phi of the ops for scale s of that many, alone."""
        phis = self.phis()
        phi = phis[assignment(len(phis), scales)[s]]
        return (
            (phi.weight.unsqueeze(0), phi.bias.unsqueeze(0), self.quant_resi_ratio, [0])
            if isinstance(phi, Phi)
            else None
        )

    def embed_to_fhat(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool = True, last_one: bool = False
    ) -> Maps | Tensor:
        """Decodes code maps h_s [B, C, h, w] of the scales, or of a prefix: f_hat_s = sum_{t <= s} phi_t(up(h_t)).

        Args:
            ms_h_BChw: one map a scale.
            all_to_max_scale: False lets f_hat grow with the scales, f_hat_s = up(f_hat_{s-1}) + phi_s(h_s).
            last_one: the last map alone in place of the list.

        Raises:
            ValueError: maps that are not those of the scales.
        """
        maps = list(ms_h_BChw)
        for s, h in enumerate(maps):
            self._maps(f"ms_h_BChw[{s}]", h)
        if not maps or [tuple(h.shape[2:]) for h in maps] != self.scales[: len(maps)]:
            got = [tuple(h.shape[2:]) for h in maps]
            raise ValueError(f"{NAME}: ms_h_BChw: wanted maps of the first scales of {self.scales}, got {got}")
        if all_to_max_scale:
            sums = list(accumulate(self._contributions(maps, self.scales, self.scales[-1])))
        else:
            sums = []
            for s, h in enumerate(maps):
                step = _raise(h, self.scales[s], self._phi_of(s, len(self.scales)), self.backend)
                sums.append(_raise(sums[-1], self.scales[s], None, self.backend) + step if sums else step)
        return sums[-1] if last_one else sums

    def idxBl_to_var_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor:
        """Teacher forcing: what VAR reads for scales 2..S after ids [B, h w] of the scales, [B, L - h_1 w_1, C].

        For every scale but the last, f_hat += phi_s(up(E[i_s])), and area(f_hat) at the next scale is emitted. With S = 1
        there are no rows.
        """
        ids = torch.cat(list(gt_ms_idx_Bl), dim=1)
        place = {**self._options(self.scales), "size": self.scales[-1], "rule": "accumulate"}
        return ops.multiscale_inputs(ids, [self.embedding.weight], **place)

    def get_next_autoregressive_input(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """One step of sampling: f_hat += phi(up(h)), in place; no earlier scale is computed again.

        Args:
            si: the scale of h, from 0.
            SN: how many scales there are.
            f_hat: running map [B, C, H, W], written.
            h_BChw: codes [B, C, h, w] of scale si, or mixtures of them.

        Returns:
            f_hat, and area(f_hat) at the next scale [B, C, h', w'], or f_hat again after the last.

        Raises:
            ValueError: si or SN that are no scale, maps of other widths.
        """
        if not 1 <= ops._check.integer(NAME, "SN", SN) <= len(self.scales):
            raise ValueError(f"{NAME}: SN: wanted a number of scales in 1..{len(self.scales)}, got {SN}")
        if not 0 <= ops._check.integer(NAME, "si", si) < SN:
            raise ValueError(f"{NAME}: si: wanted a scale in 0..{SN - 1}, got {si}")
        self._maps("f_hat", f_hat)
        self._maps("h_BChw", h_BChw)
        f_hat.add_(_raise(h_BChw, f_hat.shape[2:], self._phi_of(si, SN), self.backend))
        if si == SN - 1:
            return f_hat, f_hat
        return f_hat, _area(f_hat, pair(NAME, "v_patch_nums", self.v_patch_nums[si + 1]), self.backend)

    def extra_repr(self) -> str:
        return (
            f"{self.v_patch_nums}, znorm={self.using_znorm}, beta={self.beta}, vocab_size={self.vocab_size}, "
            f"Cvae={self.Cvae}, quant_resi={self.quant_resi_ratio}, quirks={self.quirks}"
        )
