"""The state that every quantizer module shares: codebooks, how they move, and how much of them is used."""

import torch
from torch import nn

from tokenflow_ext import ops
from tokenflow_ext.ops._native import real, tell_counts
from tokenflow_ext.ops.quantize import HITS, NOTHING, SUMS

UPDATES = ("gradient", "ema", "none")


def _all_reduce(*tensors: torch.Tensor) -> None:
    """Sums over the ranks of torch.distributed, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def _broadcast(*tensors: torch.Tensor) -> None:
    """Rank 0's values for every rank of torch.distributed, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


def _recomputing() -> bool:
    """Inside backward: a checkpointed forward runs again and must not count its rows twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def keep_precision(module: nn.Module, apply, fn, recurse: bool) -> nn.Module:
    """`apply(fn, recurse)` of a module whose own tensors move devices but never become half precision."""
    owned = {**module._parameters, **module._buffers}
    tensors = {name: t for name, t in owned.items() if t is not None and t.dtype in (torch.float32, torch.float64)}
    before = {name: (t.detach(), t.grad) for name, t in tensors.items()}
    apply(fn, recurse)
    for name, (value, grad) in before.items():
        tensor = getattr(module, name)
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor.data = value.to(tensor.device)
            if grad is not None:
                tensor.grad = grad.to(tensor.device)
    return module


class Codebook(nn.Module):
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
        kmeans_init: the first training batch places the codes by ten steps of Lloyd's algorithm.
        dead_code_threshold: a code whose moving average of rows a batch falls below takes a random row of the batch.
    """

    normalize_mean = False

    def __init__(self, owner, widths, codes, groups, metric, update, decay, kmeans_init, dead_code_threshold):
        super().__init__()
        if update not in UPDATES:
            raise ValueError(f"{owner}: update: wanted one of {', '.join(UPDATES)}, got {update!r}")
        ops._check.metric(owner, metric)
        for name, value in (
            ("codebook_size", codes),
            ("groups", groups),
            *((f"dims[{t}]", w) for t, w in enumerate(widths)),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{owner}: {name}: wanted an integer >= 1, got {value!r}")
        if not 0 <= ops._check.number(owner, "decay", decay) <= 1:
            raise ValueError(f"{owner}: decay: wanted a number in [0, 1], got {decay}")
        ops._check.non_negative(owner, "dead_code_threshold", dead_code_threshold)
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
        self.register_buffer("hits", torch.zeros(groups, codes, dtype=torch.int64), persistent=False)
        self.kmeans_init = bool(kmeans_init)
        if self.kmeans_init:
            self.register_buffer("needs_init", torch.tensor(True))
        if update == "ema" or self.dead_code_threshold > 0:
            self.register_buffer("ema_counts", torch.ones(groups, codes, dtype=dtype))
        if update == "ema":
            self.register_buffer("ema_sums", self.joined().clone())

    def tables(self) -> tuple[torch.Tensor, ...]:
        """The T tables as they are stored, [K, D_t] or [G, K, D]."""
        return tuple(getattr(self, f"table_{t}") for t in range(len(self.widths)))

    def joined(self) -> torch.Tensor:
        """The tables side by side, [G, K, C]."""
        return torch.cat(self.tables(), dim=-1).reshape(self.groups, self.codes, -1)

    def rows(self, indices: torch.Tensor, backend: str) -> torch.Tensor:
        """The codes [..., C] (or [..., G, D]) as quantized values are made of them: unit per table for cosine."""
        parts = [ops.lookup(indices, table, backend=backend) for table in self.tables()]
        if self.metric == "cosine":
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

    @torch.no_grad()
    def searched(self, rows: torch.Tensor, backend: str) -> torch.Tensor:
        """Rows [..., C] (or [..., G, D]) as they are compared with the codes: unit per table for cosine."""
        return self._unit(rows.to(real(rows, self.table_0)), backend)

    @torch.no_grad()
    def initialise(self, rows: torch.Tensor, weights, backend: str) -> None:
        """k-means on the finite rows of the first training batch [N, G, C] that has some, where it was asked for."""
        if not (self.kmeans_init and self.training and bool(self.needs_init)):
            return
        rows = rows.detach().to(self.table_0.dtype)
        rows = self._unit(rows[rows.isfinite().flatten(1).all(1)], backend)
        found = torch.tensor(float(len(rows)), device=rows.device)
        _all_reduce(found)
        if not found:
            return
        joined = self.joined()
        if len(rows):
            joined = rows[torch.randint(len(rows), (self.codes,), device=rows.device)].transpose(0, 1).contiguous()
        _broadcast(joined)
        for _ in range(10):
            self._write(joined)
            ids = self.search(rows, weights, backend)
            counts, sums = ops.code_statistics(rows, ids, (self.groups, self.codes), backend=backend)
            _all_reduce(counts, sums)
            means = self._unit(sums / counts.clamp_min(1)[..., None], backend)
            joined = torch.where((counts > 0)[..., None], means, joined)
        self._write(joined)
        if self.update == "ema":
            self.ema_sums.copy_(joined)
        self.needs_init.fill_(False)

    def moves(self) -> bool:
        """Whether `observe` writes to the codebooks."""
        return self.update == "ema" or self.dead_code_threshold > 0

    def _write(self, joined: torch.Tensor) -> None:
        for table, part in zip(self.tables(), joined.split(self.widths, dim=-1)):
            table.detach().copy_(part.reshape(table.shape))

    def search(self, rows: torch.Tensor, weights, backend: str) -> torch.Tensor:
        """Ids [N, G] of rows [N, G, C]."""
        if self.groups > 1:
            return ops.nearest_code(rows, self.table_0, metric=self.metric, backend=backend)
        parts = rows[:, 0].split(self.widths, dim=-1)
        ids = ops.shared_nearest_code(parts, self.tables(), metric=self.metric, weights=weights, backend=backend)
        return ids[:, None]

    def wanted_statistics(self) -> int:
        """What `observe` needs to know of the rows: nothing, how many chose each code, or also their sums."""
        if not self.training or _recomputing():
            return NOTHING
        return SUMS if self.update == "ema" else HITS

    @torch.no_grad()
    def observe(self, rows: torch.Tensor, ids: torch.Tensor, backend: str, counts=None, sums=None) -> None:
        """Counts a training batch and moves the codebooks by it.

        Args:
            rows: [N, G, C]; those that are not finite count nowhere.
            ids: [N, G] that they chose.
            backend: of the ops.
            counts: rows of every code [G, K] (or [K]), and sums of them as searched, where the search has them already.
            sums: see counts.
        """
        if not self.training or _recomputing():
            return
        rows = rows.detach()
        if counts is None:
            counts, sums = self._count(rows, ids, backend)
        counts = counts.view_as(self.hits)
        self.hits += counts.to(torch.int64)
        if self.update == "ema":
            counts, sums = counts.to(self.ema_counts.dtype), sums.view_as(self.ema_sums).to(self.ema_sums.dtype)
            _all_reduce(counts, sums)
            self._follow(counts, sums, backend)
        elif self.dead_code_threshold > 0:
            counts = counts.to(self.ema_counts.dtype)
            _all_reduce(counts)
            self.ema_counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        if self.dead_code_threshold > 0:
            self._revive(rows, rows.isfinite().all(-1), backend)

    def _count(self, rows: torch.Tensor, ids: torch.Tensor, backend: str):
        """counts [G, K] and, where an average needs them, sums [G, K, C] of the rows as searched."""
        if self.update == "ema":
            unit = self._unit(rows.to(self.table_0.dtype), backend)
            return ops.code_statistics(unit, ids, (self.groups, self.codes), backend=backend)
        good = rows.isfinite().all(-1).to(torch.int64)
        offset = torch.arange(self.groups, device=ids.device) * self.codes
        counts = torch.zeros_like(self.hits).view(-1).scatter_add_(0, (ids + offset).reshape(-1), good.reshape(-1))
        return counts.view_as(self.hits), None

    def _follow(self, counts: torch.Tensor, sums: torch.Tensor, backend: str) -> None:
        """The step of the moving averages; codes without rows keep their bits."""
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

    def _revive(self, rows: torch.Tensor, good: torch.Tensor, backend: str) -> None:
        fresh, take = self.joined(), torch.zeros_like(self.ema_counts, dtype=torch.bool)
        if rows.shape[0]:
            pick = torch.randint(rows.shape[0], (self.codes,), device=rows.device)
            fresh = self._unit(rows[pick].to(self.table_0.dtype), backend).transpose(0, 1).contiguous()
            take = (self.ema_counts < self.dead_code_threshold) & good[pick].transpose(0, 1)
        take = take.to(torch.uint8)
        _broadcast(fresh, take)
        take = take.bool()
        self._write(torch.where(take[..., None], fresh, self.joined()))
        self.ema_counts.masked_fill_(take, 1.0)
        if self.update == "ema":
            self.ema_sums.copy_(torch.where(take[..., None], fresh, self.ema_sums))

    def usage(self) -> float:
        """Share of codes hit since `reset_usage()`, in training. On CUDA it also warns of rows that were not finite."""
        tell_counts(self.hits.device)
        return float((self.hits > 0).double().mean())

    def perplexity(self) -> float:
        """exp of the entropy of the hits since `reset_usage()`, mean over groups; 0 before any."""
        share = self.hits.double() / self.hits.sum(-1, keepdim=True).clamp_min(1)
        entropy = -(share * share.clamp_min(1e-300).log()).sum(-1)
        return float(entropy.exp().mean()) if bool((self.hits > 0).any()) else 0.0

    def _apply(self, fn, recurse=True):
        return keep_precision(self, super()._apply, fn, recurse)
