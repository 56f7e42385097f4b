"""code_statistics and ema_update_: what an exponential moving average of a codebook needs; collectives go in between."""

import torch

from tokenflow_ext import reference
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import check_ids, constant, real, runs_on, use_native, warn_non_finite
from tokenflow_ext.ops._operator import define
from tokenflow_ext.ops.search import tables_of


def _code_statistics(x, indices, codes):
    x, indices = x.contiguous(), indices.contiguous()
    counts, sums = _code_statistics_fake(x, indices, codes)
    core, where = runs_on(x)
    outside, bad = core.code_statistics(x, indices, counts, sums, *where)
    check_ids("code_statistics", outside, codes[-1])
    warn_non_finite("code_statistics", bad)
    return counts, sums


def _code_statistics_fake(x, indices, codes):
    dtype = real(x)
    return x.new_empty(codes, dtype=dtype), x.new_empty((*codes, x.shape[-1]), dtype=dtype)


def _ema_update_(codebook, ema_counts, ema_sums, counts, sums, decay, eps, metric, normalize_mean):
    counts, sums = counts.contiguous(), sums.contiguous()
    tables = tables_of(codebook.shape[-1:], (1.0,), metric)
    # A write through a pointer is invisible to autograd: without this a gradient that needs the old values goes wrong silently.
    torch.autograd.graph.increment_version((codebook, ema_counts, ema_sums))
    core, where = runs_on(codebook)
    core.ema_update(codebook, ema_counts, ema_sums, counts, sums, tables, decay, eps, normalize_mean, *where)


CODE_STATISTICS = define(
    "code_statistics(Tensor x, Tensor indices, SymInt[] codes) -> (Tensor, Tensor)",
    _code_statistics,
    _code_statistics_fake,
)
EMA_UPDATE_ = define(
    "ema_update_(Tensor(a!) codebook, Tensor(b!) ema_counts, Tensor(c!) ema_sums, Tensor counts, Tensor sums, float decay, "
    "float eps, str metric, bool normalize_mean) -> ()",
    _ema_update_,
    lambda *args: None,
)


def code_statistics(x: torch.Tensor, indices: torch.Tensor, codes: int | tuple[int, int], *, backend: str = "auto"):
    """counts_k = rows of code k, sums_k = their sum: one pass, no one-hot, the same bits for every thread count.

    Args:
        x: rows [..., D], or [..., G, D] with codes = (G, K); any float type.
        indices: int64 ids [...] (or [..., G]) of those rows.
        codes: K, or (G, K) for G codebooks.
        backend: "auto", "native" or "reference".

    Returns:
        counts [K], sums [K, D] (or [G, K], [G, K, D]), float32 (float64 for float64). Rows that are not finite are left
        out. Not differentiable.

    Raises:
        ValueError: shapes that do not fit, ids outside the table.
        TypeError: wrong types.

    Example:
        >>> code_statistics(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 0, 2]), 3)
        (tensor([2., 0., 1.]), tensor([[3.],
                [0.],
                [5.]]))
    """
    op = "code_statistics"
    _check.floating(op, "x", x)
    _check.ids(op, "indices", indices)
    _check.same_device(op, x=x, indices=indices)
    grouped = isinstance(codes, (tuple, list))
    if grouped and len(codes) != 2:
        raise ValueError(f"{op}: codes: wanted K or (G, K), got {len(codes)} numbers")
    groups, size = (_check.integer(op, "codes", c) for c in (codes if grouped else (1, codes)))
    if groups < 1 or size < 1:
        raise ValueError(f"{op}: codes: wanted K >= 1 or (G, K) with both >= 1, got {codes}")
    if x.dim() < 1 or indices.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: indices: wanted {list(x.shape[:-1])} for rows {list(x.shape)}, got {list(indices.shape)}"
        )
    if grouped and (x.dim() < 2 or x.shape[-2] != groups):
        raise ValueError(f"{op}: x: wanted [..., {groups}, D] for codes {tuple(codes)}, got {list(x.shape)}")
    if not use_native(op, backend, x):
        _check.ids_in_range(op, indices, size)
        _check.warn_about_rows(op, x)
        return reference.code_statistics(x.detach(), indices, codes)
    return CODE_STATISTICS(constant(x), indices, (groups, size) if grouped else (size,))


def ema_update_(
    codebook: torch.Tensor,
    ema_counts: torch.Tensor,
    ema_sums: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    metric: str = "cosine",
    normalize_mean: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Moves a codebook towards the rows that chose it; writes codebook, ema_counts and ema_sums in place.

    ema_counts = decay ema_counts + (1 - decay) counts, ema_sums likewise; with n = sum(ema_counts) every code with
    counts_k > 0 becomes ema_sums_k / ((ema_counts_k + eps) / (n + K eps) n), unit for cosine; the others stay.

    Args:
        codebook: [K, D] or [G, K, D], float32 or float64, contiguous, no gradient; start ema_sums as its copy.
        ema_counts: [K] or [G, K] of the codebook's type; start at 1.
        ema_sums: shape of codebook.
        counts: from `code_statistics`, summed over ranks.
        sums: likewise; for cosine the rows are unit before they are summed.
        decay: in [0, 1].
        eps: Laplace smoothing.
        metric: "cosine" makes the codes unit again.
        normalize_mean: VQ-KD's rule, the sums are replaced by the unit mean of the batch.
        backend: "auto", "native" or "reference".

    Returns:
        codebook.

    Raises:
        ValueError, TypeError: shapes, types or devices that do not fit, or a tensor that requires grad.

    Source: van den Oord et al., 1711.00937, appendix A.1; normalize_mean 2411.04406.

    Example:
        >>> codebook, counts, sums = torch.zeros(2, 1), torch.ones(2), torch.zeros(2, 1)
        >>> ema_update_(codebook, counts, sums, torch.tensor([1.0, 0.0]), torch.tensor([[4.0], [0.0]]), decay=0.5, metric="l2")
        tensor([[2.0000],
                [0.0000]])
    """
    op = "ema_update_"
    _check.table(op, "codebook", codebook)
    _check.metric(op, metric)
    if not 0 <= _check.number(op, "decay", decay) <= 1:
        raise ValueError(f"{op}: decay: wanted a number in [0, 1], got {decay}")
    _check.non_negative(op, "eps", eps)
    _check.flag(op, "normalize_mean", normalize_mean)
    wanted = {
        "ema_counts": codebook.shape[:-1],
        "ema_sums": codebook.shape,
        "counts": codebook.shape[:-1],
        "sums": codebook.shape,
    }
    given = {"ema_counts": ema_counts, "ema_sums": ema_sums, "counts": counts, "sums": sums}
    if codebook.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: codebook: wanted float32 or float64, got {codebook.dtype}")
    for name, tensor in given.items():
        _check.floating(op, name, tensor)
        if tensor.dtype != codebook.dtype:
            raise TypeError(f"{op}: {name}: wanted the codebook's {codebook.dtype}, got {tensor.dtype}")
        if tensor.shape != wanted[name]:
            raise ValueError(f"{op}: {name}: wanted {list(wanted[name])}, got {list(tensor.shape)}")
    _check.same_device(op, codebook=codebook, **given)
    written = {"codebook": codebook, "ema_counts": ema_counts, "ema_sums": ema_sums}
    for name, tensor in written.items():
        if tensor.requires_grad:
            raise ValueError(f"{op}: {name}: wanted a tensor without gradient, got one that requires grad")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name}: wanted a contiguous tensor to write to, got strides {tensor.stride()}")
    if not use_native(op, backend, codebook):
        return reference.ema_update_(
            codebook,
            ema_counts,
            ema_sums,
            counts,
            sums,
            decay=decay,
            eps=eps,
            metric=metric,
            normalize_mean=normalize_mean,
        )
    EMA_UPDATE_(codebook, ema_counts, ema_sums, counts, sums, float(decay), float(eps), metric, normalize_mean)
    return codebook
