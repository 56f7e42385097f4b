"""nearest_code and shared_nearest_code: exhaustive search that never forms an N x K matrix."""

from collections.abc import Sequence

import torch

from tokenflow_ext import reference
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import _C, define, real, threads, use_native, view, warn_non_finite


def tables_of(widths, weights, metric, unit_codes: bool | None = None):
    """The descriptor `Tables` of csrc/common/view.h."""
    unit = metric == "cosine"
    return list(widths), list(weights), metric == "l2", unit, unit if unit_codes is None else unit_codes


def search_space(rows: int, codes: int, channels: int, dtype: torch.dtype, *, topk: int = 1) -> torch.Tensor:
    """Workspace of one search: the packed codebook, once more in 8 bits where the scan is certified, and tables of minima."""
    wide = dtype == torch.float64
    return torch.empty(_C.search_bytes(rows, topk, codes, channels, wide, threads()), dtype=torch.uint8)


def _nearest_code(x, codebook, widths, weights, metric, topk, lo, hi, with_scores):
    x, codebook = x.contiguous(), codebook.contiguous()
    rows, groups, channels = x.shape
    indices = torch.empty((rows, groups, topk), dtype=torch.int64)
    # The kernel keeps up to 64 scores of a row on its own stack.
    scores = codebook.new_empty((rows, groups, topk)) if with_scores or topk > 64 else None
    staged = codebook.new_empty((rows, channels))
    workspace = search_space(rows, hi - lo, channels, codebook.dtype, topk=topk)
    status = torch.empty(1, dtype=torch.int64)
    _C.nearest_code(
        view(x), view(codebook), tables_of(widths, weights, metric), lo, hi,
        view(staged), view(workspace), view(indices), view(scores), view(status), threads(),
    )  # fmt: skip
    warn_non_finite("nearest_code", status)
    return indices, scores if with_scores else codebook.new_empty(0)


def _nearest_code_fake(x, codebook, widths, weights, metric, topk, lo, hi, with_scores):
    shape = (x.shape[0], x.shape[1], topk)
    return x.new_empty(shape, dtype=torch.int64), codebook.new_empty(shape if with_scores else (0,))


define(
    "nearest_code(Tensor x, Tensor codebook, int[] widths, float[] weights, str metric, int topk, int lo, int hi, "
    "bool with_scores) -> (Tensor, Tensor)",
    _nearest_code,
    _nearest_code_fake,
)


def nearest_code(
    x: torch.Tensor,
    codebook: torch.Tensor,
    *,
    metric: str = "l2",
    topk: int = 1,
    window: tuple[int, int] | None = None,
    return_scores: bool = False,
    backend: str = "auto",
):
    """The id of the best code of every row: argmin_k score(x, c_k).

    score = 0.5 |c|^2 - x.c (l2), -x.c (dot), -x.c of unit vectors (cosine); lower is better, on equal scores the lowest
    id wins. The arithmetic is float32 (float64 for float64) whatever the types, so a bfloat16 row gets the id that its
    exact upcast gets.

    Args:
        x: rows [..., D] for a codebook [K, D], or [..., G, D] for [G, K, D].
        codebook: codes, of any float type.
        metric: "l2", "dot" or "cosine".
        topk: how many ids a row, best first.
        window: (lo, hi) searches codes lo .. hi-1 only.
        return_scores: also return the scores.
        backend: "auto", "native" or "reference".

    Returns:
        int64 ids [...] (or [..., G]), with a trailing axis of topk where topk > 1; with `return_scores` the pair
        (ids, scores).

    Raises:
        ValueError, TypeError: a sentence with op, argument, wanted, got.

    Source: api.md, "Canonical score".

    Example:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
        >>> nearest_code(torch.tensor([[0.9, 1.2], [4.0, 6.0]]), codebook)
        tensor([1, 2])
    """
    rows, table = _check.rows_and_table("nearest_code", x, codebook)
    _check.metric("nearest_code", metric)
    codes = table.shape[1]
    lo, hi = (0, codes) if window is None else _window(window)
    if not 0 <= lo < hi <= codes:
        raise ValueError(f"nearest_code: window: wanted 0 <= lo < hi <= {codes}, got ({lo}, {hi})")
    if not 1 <= _check.integer("nearest_code", "topk", topk) <= hi - lo:
        raise ValueError(f"nearest_code: topk: wanted 1 to {hi - lo} codes of the window, got {topk}")
    if not use_native("nearest_code", backend, x.device):
        _check.warn_about_rows("nearest_code", rows)
        return reference.nearest_code(x, codebook, metric=metric, topk=topk, window=window, return_scores=return_scores)
    indices, scores = torch.ops.tokenflow_ext.nearest_code(
        rows.detach(),
        table.detach().to(real(x, codebook)),
        [table.shape[2]],
        [1.0],
        metric,
        topk,
        lo,
        hi,
        return_scores,
    )
    shape = x.shape[:-1] + ((topk,) if topk > 1 else ())
    return (indices.reshape(shape), scores.reshape(shape)) if return_scores else indices.reshape(shape)


def _window(window) -> tuple[int, int]:
    if isinstance(window, (str, torch.Tensor)) or not isinstance(window, Sequence):
        raise TypeError(f"nearest_code: window: wanted a pair (lo, hi), got {type(window).__name__}")
    if len(window) != 2:
        raise ValueError(f"nearest_code: window: wanted a pair (lo, hi), got {len(window)} numbers")
    return _check.integer("nearest_code", "window[0]", window[0]), _check.integer(
        "nearest_code", "window[1]", window[1]
    )


def shared_nearest_code(xs, codebooks, *, metric: str = "cosine", weights=None, backend: str = "auto") -> torch.Tensor:
    """One id a row over T tables: argmin_k sum_t weights[t] d_t(xs[t], codebooks[t]_k).

    Args:
        xs: T tensors [..., D_t] of one type.
        codebooks: T tables [K, D_t].
        metric: distance of every table, "cosine", "l2" or "dot".
        weights: T numbers >= 0, 1 each by default.
        backend: "auto", "native" or "reference".

    Returns:
        int64 ids [...].

    Raises:
        ValueError, TypeError: a sentence with op, argument, wanted, got.

    Source: TokenFlow, arXiv 2412.03069, section 3.1.

    Example:
        >>> semantic, pixel = torch.eye(2), torch.tensor([[1.0], [-1.0]])
        >>> shared_nearest_code((torch.tensor([[1.0, 0.9]]), torch.tensor([[-2.0]])), (semantic, pixel))
        tensor([1])
    """
    op = "shared_nearest_code"
    widths, weights = _check.shared_tables(op, xs, codebooks, weights)
    _check.metric(op, metric)
    if not use_native(op, backend, xs[0].device):
        _check.warn_about_rows(op, *xs)
        return reference.shared_nearest_code(xs, codebooks, metric=metric, weights=weights)
    x, codebook = concatenate([x.detach() for x in xs], [c.detach() for c in codebooks])
    codes = codebook.shape[1]
    indices, _ = torch.ops.tokenflow_ext.nearest_code(x, codebook, widths, weights, metric, 1, 0, codes, False)
    return indices.reshape(xs[0].shape[:-1])


def concatenate(xs, codebooks) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables that share an index are one table split by widths: rows [N, 1, C], codebook [1, K, C] of the real type."""
    dtype = real(*xs, *codebooks)
    x = torch.cat(tuple(xs), dim=-1) if len(xs) > 1 else xs[0]
    codebook = torch.cat([c.to(dtype) for c in codebooks], dim=-1)
    return x.reshape(_check.count(x.shape[:-1]), 1, x.shape[-1]), codebook[None]
