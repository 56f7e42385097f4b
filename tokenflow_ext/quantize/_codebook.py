"""The state that every quantizer module shares: codebooks, how they move, and how much of them is used."""

import contextlib
import math

import torch
from torch import nn

from tokenflow_ext import ops
from tokenflow_ext.ops._native import counted_by_the_caller, in_type, may_look, real, tell_counts
from tokenflow_ext.ops.quantize import HITS, NOTHING, SUMS
from tokenflow_ext.quantize import _ranks, _usage
from tokenflow_ext.quantize._kmeans import kmeans, sample
from tokenflow_ext.quantize._precision import FullPrecision

UPDATES = ("gradient", "ema", "none")


def recomputing() -> bool:
    """Inside backward: a checkpointed forward runs again and must not count its rows twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Codebook(FullPrecision):
    """T tables under one index for each of G groups: [K, D_t] or, where G > 1, [G, K, D].

    Internally rows are [N, G, C] and the tables lie side by side, [G, K, C] with C = sum of D_t. Codebooks stay float32
    (float64) when the model around them becomes half precision, so that its tokens stay those of float32.

    Args:
        owner: name of the module for the sentences.
        widths: D_t of the T tables.
        codes: K.
        groups: G; T must be 1 where G > 1.
        metric: "cosine", "l2" or "dot".
        update: "gradient" (parameters), "ema" (buffers that follow their rows) or "none" (buffers that stay, but for k-means
            initialisation).
        decay: of the exponential moving averages.
        kmeans_init: the first training batch places the codes by k-means.
        dead_code_threshold: a code whose moving average of rows a batch, over all ranks, falls below takes a random row of it.

    Attributes:
        hits: [G, K] int64, how often this rank's rows chose each code in training since `reset_usage`.
        non_finite: 0-dim int64, this rank's rows (of each group) with NaN or inf in training.
        collapse_threshold: perplexity over K below which a warning tells of a collapse; 0 turns it off.
    """

    counters = ("hits", "non_finite")
    normalize_mean = False

    def __init__(self, owner, widths, codes, groups, metric, update, decay, kmeans_init, dead_code_threshold):
        super().__init__()
        ops._check.one_of(owner, "update", update, UPDATES)
        ops._check.metric(owner, metric)
        for name, value in (
            ("codebook_size", codes),
            ("groups", groups),
            *((f"dims[{t}]", w) for t, w in enumerate(widths)),
        ):
            ops._check.positive(owner, name, value)
        decay = ops._check.share(owner, "decay", decay)
        dead_code_threshold = ops._check.non_negative(owner, "dead_code_threshold", dead_code_threshold)
        self.widths, self.codes, self.groups, self.metric = list(widths), codes, groups, metric
        self.update, self.decay = update, decay
        self.dead_code_threshold = dead_code_threshold if update != "none" else 0
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        for t, width in enumerate(self.widths):
            table = torch.randn((groups, codes, width) if groups > 1 else (codes, width), dtype=dtype)
            table = ops.normalize_rows(table, backend="reference") if metric == "cosine" else table / width**0.5
            if update == "gradient":
                self.register_parameter(f"table_{t}", nn.Parameter(table))
            else:
                self.register_buffer(f"table_{t}", table)
        self.owner, self.collapse_threshold = owner, _usage.COLLAPSED
        self.hits, self.non_finite = torch.zeros(groups, codes, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        self._told, self._looked = set(), 0
        # Reading the buffer waits for the device: once, until a checkpoint or a move may have changed it.
        self._placed = None
        self.kmeans_init = ops._check.flag(owner, "kmeans_init", kmeans_init)
        if self.kmeans_init:
            self.register_buffer("needs_init", torch.tensor(True))
        if update == "ema" or self.dead_code_threshold > 0:
            self.register_buffer("ema_counts", torch.ones(groups, codes, dtype=dtype))
        if self.dead_code_threshold > 0:
            self.register_buffer("revivals", torch.zeros((), dtype=torch.int64))
        if update == "ema":
            self.register_buffer("ema_sums", self.joined().clone())

    def tables(self) -> tuple[torch.Tensor, ...]:
        """The T tables as they are stored, [K, D_t] or [G, K, D]."""
        return tuple(getattr(self, f"table_{t}") for t in range(len(self.widths)))

    def joined(self) -> torch.Tensor:
        """The tables side by side, [G, K, C]."""
        return torch.cat(self.tables(), dim=-1).reshape(self.groups, self.codes, -1)

    def rows(self, indices: torch.Tensor, backend: str, *, unit: bool | None = None, dtype=None) -> torch.Tensor:
        """The codes [..., C] (or [..., G, D]) as quantized values are made of them: unit per table for cosine.

        `unit` says otherwise; `dtype` is what they are computed in, the tables' by default.
        """
        parts = [ops.lookup(indices, in_type(t, dtype or t.dtype), backend=backend) for t in self.tables()]
        if self.metric == "cosine" if unit is None else unit:
            parts = [ops.normalize_rows(part, backend=backend) for part in parts]
        return torch.cat(tuple(parts), dim=-1)

    def freeze(self) -> None:
        """Codebooks move no more, by no rule."""
        self.update, self.dead_code_threshold, self.kmeans_init = "none", 0, False
        for table in self.tables():
            table.requires_grad_(False)

    def _unit(self, rows: torch.Tensor, backend: str) -> torch.Tensor:
        if self.metric != "cosine":
            return rows
        return torch.cat([ops.normalize_rows(p, backend=backend) for p in rows.split(self.widths, dim=-1)], dim=-1)

    def waits_for_kmeans(self) -> bool:
        """Whether the next training batch with finite rows places the codes."""
        if not (self.kmeans_init and self.training):
            return False
        if self._placed is None:
            self._placed = not bool(self.needs_init)
        return not self._placed

    @torch.no_grad()
    def searched(self, rows: torch.Tensor, backend: str) -> torch.Tensor:
        """Rows [..., C] (or [..., G, D]) as they are compared with the codes: unit per table for cosine."""
        return self._unit(rows.to(real(rows, self.table_0)), backend)

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, weights, backend: str, mask=None, again=None) -> None:
        """k-means on the first training batch that has finite rows, where it was asked for.

        Args:
            rows: [N, G, C].
            weights: of the tables in the distance.
            backend: of the ops.
            mask: [N], the rows that count; all by default.
            again: a function that gives the rows [N, G, C] which codes placed so far are searched for, for a second k-means:
                residual quantization has no rows before it has codes.
        """
        if not self.waits_for_kmeans() or recomputing():
            return
        for give in (lambda: rows, again):
            if give is None:
                continue
            found = give().detach().to(self.table_0.dtype)
            good = found.isfinite().flatten(1).all(1)
            drawn = sample(found, good if mask is None else good & mask, self.codes)
            if not len(drawn):
                return
            self._write(self._kmeans(self._unit(drawn, backend), weights, backend))
        if self.update == "ema":
            self.ema_sums.copy_(self.joined())
        self.needs_init.fill_(False)
        self._placed = True

    def _kmeans(self, rows: torch.Tensor, weights, backend: str) -> torch.Tensor:
        # A scalar product has no means; its codes start where the rows lie.
        metric = "l2" if self.metric == "dot" else self.metric
        per_channel = [w for w, width in zip(weights, self.widths) for _ in range(width)]
        placed = kmeans(
            rows,
            self.codes,
            torch.tensor(per_channel, dtype=rows.dtype, device=rows.device),
            lambda x, table: self._nearest(x, self._parts(table), metric, weights, backend),
            lambda table: self._unit(table, backend),
            backend,
        )
        # Ranks of unlike machines may round differently.
        _ranks.broadcast(placed)
        return placed

    def moves(self) -> bool:
        """Whether `observe` writes to the codebooks."""
        return self.update == "ema" or self.dead_code_threshold > 0

    def _parts(self, joined: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[G, M, C] as tables lie: T times [M, D_t], or one [G, M, D]."""
        return (joined,) if self.groups > 1 else joined[0].split(self.widths, dim=-1)

    def _write(self, joined: torch.Tensor) -> None:
        for table, part in zip(self.tables(), self._parts(joined)):
            table.detach().copy_(part)

    def search(self, rows: torch.Tensor, weights, backend: str) -> torch.Tensor:
        """Ids [N, G] of rows [N, G, C]."""
        return self._nearest(rows, self.tables(), self.metric, weights, backend)

    def _nearest(self, rows: torch.Tensor, tables, metric: str, weights, backend: str) -> torch.Tensor:
        if self.groups > 1:
            return ops.nearest_code(rows, tables[0], metric=metric, backend=backend)
        parts = rows[:, 0].split(self.widths, dim=-1)
        return ops.shared_nearest_code(parts, tables, metric=metric, weights=weights, backend=backend)[:, None]

    def wanted_statistics(self) -> int:
        """What `observe` needs to know of the rows: nothing, how many chose each code, or also their sums."""
        if not self.training or recomputing():
            return NOTHING
        return SUMS if self.update == "ema" else HITS

    def quietly(self):
        """A block in which ops do not warn of rows that are not finite, for `observe` counts them and warns once."""
        wanted = self.training and not torch.compiler.is_compiling()
        return counted_by_the_caller() if wanted else contextlib.nullcontext()

    @torch.no_grad()
    def observe(self, rows: torch.Tensor, ids: torch.Tensor, backend: str, counts=None, sums=None, mask=None) -> None:
        """Counts a training batch and moves the codebooks by it.

        Args:
            rows: [N, G, C]; those that are not finite count nowhere.
            ids: [N, G] that they chose.
            backend: of the ops.
            counts: rows of every code [G, K] (or [K]), and sums of them as searched, where the search has them already.
            sums: see counts.
            mask: [N], the rows that count; all by default.
        """
        if not self.training or recomputing():
            return
        rows = rows.detach()
        if counts is None:
            counts, sums = self._count(rows, ids, mask, backend)
        counts = counts.view_as(self.hits)
        hits = counts.to(torch.int64)
        self.hits += hits
        self._watch((rows.shape[0] if mask is None else mask.sum()) * self.groups - hits.sum())
        if self.update == "ema":
            counts, sums = counts.to(self.ema_counts.dtype), sums.view_as(self.ema_sums).to(self.ema_sums.dtype)
            _ranks.all_reduce(counts, sums)
            self._follow(counts, sums, backend)
        elif self.dead_code_threshold > 0:
            counts = counts.to(self.ema_counts.dtype)
            _ranks.all_reduce(counts)
            self.ema_counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        if self.dead_code_threshold > 0:
            self._revive(rows, ids, mask, backend)

    def _watch(self, bad: torch.Tensor) -> None:
        """Adds up the rows that are not finite; on the CPU, where looking costs no wait, warns of them and of a collapse."""
        if not may_look(bad):
            self.non_finite += bad
            return
        if int(bad):
            self.non_finite += bad
            self._tell_non_finite(bad)
        self._looked += 1
        if self._looked % _usage.EVERY == 0:
            self._tell_collapse(self.hits)

    def _tell_non_finite(self, bad: torch.Tensor) -> None:
        if "rows" not in self._told and int(bad):
            self._told.add("rows")
            _usage.warn_non_finite(self.owner, int(bad))

    def _tell_collapse(self, hits: torch.Tensor) -> None:
        if "collapse" not in self._told and self.collapse_threshold > 0:
            if _usage.warn_collapse(self.owner, hits, self.collapse_threshold):
                self._told.add("collapse")

    def _good(self, rows: torch.Tensor, mask) -> torch.Tensor:
        """[N, G]: the rows that count."""
        good = rows.isfinite().all(-1)
        return good if mask is None else good & mask[:, None]

    def _count(self, rows: torch.Tensor, ids: torch.Tensor, mask, backend: str):
        """counts [G, K] and, where an average needs them, sums [G, K, C] of the rows as searched."""
        if self.update == "ema":
            unit = self._unit(rows.to(self.table_0.dtype), backend)
            if mask is None:
                return ops.code_statistics(unit, ids, (self.groups, self.codes), backend=backend)
            # Rows left out choose one code more.
            ids = ids.masked_fill(~mask[:, None], self.codes)
            counts, sums = ops.code_statistics(unit, ids, (self.groups, self.codes + 1), backend=backend)
            return counts[:, :-1].contiguous(), sums[:, :-1].contiguous()
        return _usage.count(ids, self._good(rows, mask), self.codes), None

    def _follow(self, counts: torch.Tensor, sums: torch.Tensor, backend: str) -> None:
        """The step of the moving averages; codes without rows, or with sums past float's range, keep their bits."""
        if not may_look(sums) or not math.isfinite(sums.sum()):
            fits = sums.isfinite().all(-1)
            counts, sums = torch.where(fits, counts, 0), torch.where(fits.unsqueeze(-1), sums, 0)
        if len(self.widths) == 1 and self.table_0.is_contiguous():
            state = (self.table_0.view_as(self.ema_sums), self.ema_counts, self.ema_sums, counts, sums)
            options = {"metric": self.metric, "normalize_mean": self.normalize_mean}
            ops.ema_update_(*state, decay=self.decay, **options, backend=backend)
            if self.normalize_mean:  # the average is of the code itself, which is unit again after every step
                self.ema_sums.copy_(self.table_0.view_as(self.ema_sums))
            return
        joined = self.joined()
        state = (joined, self.ema_counts, self.ema_sums, counts, sums)
        ops.ema_update_(*state, decay=self.decay, metric="l2", backend=backend)
        # Unit table by table.
        self._write(torch.where((counts > 0)[..., None], self._unit(joined, backend), joined))

    def _revive(self, rows: torch.Tensor, ids: torch.Tensor, mask, backend: str) -> None:
        """Dead codes take rows of the batch of all ranks, each another one, likelier the farther they lie from their codes."""
        dead = self.ema_counts < self.dead_code_threshold
        self.revivals += 1
        if may_look(dead) and not bool(dead.any()):
            return  # on every rank, for ema_counts have the same bits there
        joined = self.joined()
        good = self._good(rows, mask)
        rows = self._unit(torch.where(good[..., None], rows, 0).to(joined.dtype), backend)
        shares = self._shares(rows, joined, ids, good)
        first, total = _ranks.numbering(shares.sum(0))
        place = torch.arange(self.codes, device=dead.device).expand_as(dead)
        seed = self.revivals * self.groups + torch.arange(self.groups, device=dead.device)
        draws = dead.sum(1)
        numbers, found = _ranks.spread(place, draws[:, None], total[:, None], seed[:, None])
        fresh = _ranks.rows_at(rows, shares, first, torch.where(place < draws[:, None], numbers, total[:, None]))
        # A row far from its code may have been drawn twice in a row.
        found[:, 1:] &= (fresh[:, 1:] != fresh[:, :-1]).any(-1)
        place = (dead.cumsum(1) - 1).clamp_min(0)
        take, fresh = dead & found.gather(1, place), fresh.gather(1, place[..., None].expand_as(fresh))
        self._write(torch.where(take[..., None], fresh, joined))
        # Counts above the threshold give a code time to find rows before it is judged again.
        counts = max(1.0, 2.0 * self.dead_code_threshold)
        self.ema_counts.masked_fill_(take, counts)
        if self.update == "ema":
            self.ema_sums.copy_(torch.where(take[..., None], fresh * counts, self.ema_sums))

    def _shares(self, rows: torch.Tensor, joined: torch.Tensor, ids: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
        """int64 [N, G] ~ squared distances of rows to their codes, at most four times their mean; 0 where it is 0 or not good."""
        near = joined.gather(1, ids.t()[..., None].expand(-1, -1, rows.shape[-1])).transpose(0, 1)
        distances = (rows - near).square().sum(-1).double()
        good = good & distances.isfinite()
        distances = torch.where(good, distances, 0)
        sums = torch.stack([distances.sum(0), good.sum(0).double()])
        _ranks.all_reduce(sums)
        most = (4 * sums[0] / sums[1].clamp_min(1)).clamp_min(torch.finfo(torch.float64).tiny)
        return ((distances / most).clamp_max(1) * 2**20).ceil().to(torch.int64)

    def usage(self, hits: torch.Tensor, per, all_ranks: bool):
        """`_usage.usage` of hits [R, K]: their mean, or each where `per` says of what they are."""
        return self._summary(_usage.usage, hits, per, all_ranks)

    def perplexity(self, hits: torch.Tensor, per, all_ranks: bool):
        """Likewise the perplexity."""
        return self._summary(_usage.perplexity, hits, per, all_ranks)

    def _summary(self, measure, hits: torch.Tensor, per, all_ranks: bool):
        tell_counts(self.hits.device)
        self._tell_non_finite(self.non_finite)
        self._tell_collapse(_usage.over_ranks(self.hits, all_ranks))
        values = measure(_usage.over_ranks(hits, all_ranks))
        return values.cpu() if per else float(values.mean())

    def non_finite_rows(self, all_ranks: bool) -> int:
        """`non_finite` of all ranks, or of this one."""
        return int(_usage.over_ranks(self.non_finite, all_ranks))

    def reset_usage(self) -> None:
        self.hits.zero_()
        self.non_finite.zero_()

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if hasattr(self, "revivals"):  # checkpoints of versions that drew their rows elsewhere have none
            state_dict.setdefault(prefix + "revivals", torch.zeros_like(self.revivals))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._placed = None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._placed = None
        return self
