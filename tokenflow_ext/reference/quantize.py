"""Twins of the single-scale ops: the specification, and the baseline of tests and benchmarks. They build N x K matrices."""

from collections.abc import Sequence

import torch

from tokenflow_ext._types import Quantized
from tokenflow_ext.reference._exact import exact


def real_type(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def unit(x: torch.Tensor) -> torch.Tensor:
    """y = x / max(|x|, 1e-12) over the last axis, computed in float32 (float64)."""
    wide = x.to(real_type(x))
    return (wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)).to(x.dtype)


@exact
def normalize_rows(x: torch.Tensor) -> torch.Tensor:
    """Twin of `tokenflow_ext.ops.normalize_rows`."""
    return unit(x)


def searched(x: torch.Tensor, widths: Sequence[int], metric: str) -> torch.Tensor:
    """The row (or code) as it is searched: unit per table for cosine, else as it is. x [..., C]."""
    if metric != "cosine":
        return x
    return torch.cat([unit(part) for part in x.split(list(widths), dim=-1)], dim=-1)


def scores(
    y: torch.Tensor, codes: torch.Tensor, widths: Sequence[int], weights: Sequence[float], l2: bool
) -> torch.Tensor:
    """sum_t w_t (0.5 |c_t|^2 [l2 only] - y_t . c_t), lower is better. y [N, C], codes [K, C] -> [N, K]."""
    scale = torch.cat([y.new_full((w,), weight) for w, weight in zip(widths, weights)])
    start = 0.5 * (scale * codes.square()).sum(-1) if l2 else 0.0
    result = start - (scale * y) @ codes.T
    # A code that scores NaN loses even against one that overflows.
    return result.nan_to_num(nan=torch.inf, posinf=torch.finfo(result.dtype).max, neginf=-torch.inf)


def search(x: torch.Tensor, codebook: torch.Tensor, widths, weights, metric: str) -> torch.Tensor:
    """x [N, G, C], codebook [G, K, C] -> ids [N, G]; rows that are not finite get id 0."""
    y, codes = searched(x, widths, metric), searched(codebook, widths, metric)
    found = [scores(y[:, g], codes[g], widths, weights, metric == "l2").argmin(-1) for g in range(codebook.shape[0])]
    return torch.where(x.isfinite().all(-1), torch.stack(found, dim=1), 0)


@exact
def nearest_code(x, codebook, *, metric="l2", topk=1, window=None, return_scores=False):
    """Twin of `tokenflow_ext.ops.nearest_code`."""
    grouped = codebook.dim() == 3
    dtype = real_type(x, codebook)
    rows = x.to(dtype).reshape(-1, codebook.shape[0] if grouped else 1, x.shape[-1])
    codebook = codebook.to(dtype).reshape(rows.shape[1], -1, x.shape[-1])
    lo, hi = window if window is not None else (0, codebook.shape[1])
    width = [x.shape[-1]]
    y, codes = searched(rows, width, metric), searched(codebook[:, lo:hi], width, metric)
    bad = ~rows.isfinite().all(-1)
    ids, values = [], []
    for g in range(rows.shape[1]):
        score = scores(y[:, g], codes[g], width, [1.0], metric == "l2").masked_fill(bad[:, g, None], 0)
        best = score.argmin(-1, keepdim=True) if topk == 1 else score.sort(dim=-1, stable=True).indices[:, :topk]
        ids.append(best + lo)
        values.append(score.gather(-1, best).masked_fill(bad[:, g, None], torch.nan))
    shape = x.shape[:-1] + ((topk,) if topk > 1 else ())
    indices, best_scores = torch.stack(ids, 1).reshape(shape), torch.stack(values, 1).reshape(shape)
    return (indices, best_scores) if return_scores else indices


@exact
def shared_nearest_code(xs, codebooks, *, metric="cosine", weights=None):
    """Twin of `tokenflow_ext.ops.shared_nearest_code`."""
    x, codebook, widths, weights = concatenate(xs, codebooks, weights)
    return search(x, codebook, widths, weights, metric).reshape(xs[0].shape[:-1])


def concatenate(xs, codebooks, weights):
    """T tables that share an index are one table: rows [N, 1, C], codebook [1, K, C], widths [T], weights [T]."""
    dtype = real_type(*xs, *codebooks)
    x = torch.cat([x.to(dtype) for x in xs], dim=-1)
    codebook = torch.cat([c.to(dtype) for c in codebooks], dim=-1)
    weights = [1.0] * len(codebooks) if weights is None else weights
    return x.reshape(-1, 1, x.shape[-1]), codebook[None], [c.shape[-1] for c in codebooks], weights


def gather(indices, codebook):
    """Rows of the codebook; an id outside of it reads as a NaN row without gradient."""
    inside = (indices >= 0) & (indices < codebook.shape[-2])
    kept = torch.where(inside, indices, 0)
    rows = (
        codebook[kept] if codebook.dim() == 2 else codebook[torch.arange(len(codebook), device=codebook.device), kept]
    )
    return torch.where(inside[..., None], rows, torch.nan)


@exact
def lookup(indices, codebook):
    """Twin of `tokenflow_ext.ops.lookup`."""
    return gather(indices, codebook)


@exact
def shared_lookup(indices, codebooks):
    """Twin of `tokenflow_ext.ops.shared_lookup`."""
    return tuple(gather(indices, codebook) for codebook in codebooks)


def quantize_rows(x, codebook, widths, weights, metric, commitment_weight, codebook_weight) -> Quantized:
    """x [N, G, C], codebook [G, K, C] of the real type -> Quantized([N, G, C] real, [N, G], [])."""
    good = x.isfinite().all(-1, keepdim=True)
    # Left-out rows become constants before any arithmetic, so that no gradient of theirs is 0 * inf.
    y = searched(torch.where(good, x, 0.0), widths, metric)
    indices = search(x.detach(), codebook.detach(), widths, weights, metric)
    q = searched(gather(indices, codebook), widths, metric)
    codebook_term = (q - y.detach()).square()
    commitment_term = (q.detach() - y).square()
    terms = codebook_weight * codebook_term + commitment_weight * commitment_term
    loss = torch.where(good, terms, 0.0).sum() / max(terms.numel(), 1)
    # (y - y) is 0 with gradient 1: the value is the code bit for bit.
    quantized = torch.where(good, q.detach() + (y - y.detach()), torch.nan)
    return Quantized(quantized, indices, loss)


@exact
def quantize(x, codebook, *, metric="cosine", commitment_weight=0.25, codebook_weight=1.0) -> Quantized:
    """Twin of `tokenflow_ext.ops.quantize`."""
    dtype = real_type(x, codebook)
    groups = codebook.shape[0] if codebook.dim() == 3 else 1
    rows = x.to(dtype).reshape(-1, groups, x.shape[-1])
    table = codebook.to(dtype).reshape(groups, -1, x.shape[-1])
    out = quantize_rows(rows, table, [x.shape[-1]], [1.0], metric, commitment_weight, codebook_weight)
    return Quantized(out.quantized.reshape(x.shape).to(x.dtype), out.indices.reshape(x.shape[:-1]), out.loss)


@exact
def shared_quantize(
    xs, codebooks, *, metric="cosine", weights=None, commitment_weight=0.25, codebook_weight=1.0
) -> Quantized:
    """Twin of `tokenflow_ext.ops.shared_quantize`."""
    x, codebook, widths, weights = concatenate(xs, codebooks, weights)
    out = quantize_rows(x, codebook, widths, weights, metric, commitment_weight, codebook_weight)
    parts = out.quantized[:, 0].to(xs[0].dtype).split(widths, dim=-1)
    quantized = tuple(part.reshape(x.shape) for part, x in zip(parts, xs))
    return Quantized(quantized, out.indices.reshape(xs[0].shape[:-1]), out.loss)


@exact
def code_statistics(x, indices, codes):
    """Twin of `tokenflow_ext.ops.code_statistics`."""
    grouped = not isinstance(codes, int)
    groups, size = codes if grouped else (1, codes)
    dtype = real_type(x)
    rows, ids = x.to(dtype).reshape(-1, groups, x.shape[-1]), indices.reshape(-1, groups)
    good = rows.isfinite().all(-1)
    counts, sums = rows.new_zeros(groups, size), rows.new_zeros(groups, size, x.shape[-1])
    for g in range(groups):
        keep = good[:, g]
        counts[g].index_add_(0, ids[keep, g], torch.ones_like(ids[keep, g], dtype=dtype))
        sums[g].index_add_(0, ids[keep, g], rows[keep, g])
    return (counts, sums) if grouped else (counts[0], sums[0])


@torch.no_grad()
def ema_update_(
    codebook, ema_counts, ema_sums, counts, sums, *, decay, eps=1e-5, metric="cosine", normalize_mean=False
):
    """Twin of `tokenflow_ext.ops.ema_update_`."""
    if normalize_mean:
        sums = unit(sums)
    ema_counts.mul_(decay).add_(counts, alpha=1 - decay)
    ema_sums.mul_(decay).add_(sums, alpha=1 - decay)
    total = ema_counts.sum(-1, keepdim=True)
    smoothed = (ema_counts + eps) / (total + ema_counts.shape[-1] * eps) * total
    codes = ema_sums / smoothed[..., None]
    codes = unit(codes) if metric == "cosine" else codes
    codebook.copy_(torch.where((counts > 0)[..., None], codes, codebook))
    return codebook
