"""nearest_code and shared_nearest_code: exhaustive search that never forms an N x K matrix."""

from collections.abc import Sequence

import torch

from tokenflow_ext import reference
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import constant, in_type, real, runs_on, use_native, warn_non_finite
from tokenflow_ext.ops._operator import define


def tables_of(widths, weights, metric, unit_codes: bool | None = None):
    """The descriptor `Tables` of csrc/common/view.h."""
    unit = metric == "cosine"
    return widths, weights, metric == "l2", unit, unit if unit_codes is None else unit_codes


def _nearest_code(x, codebook, metric, topk=1, window=None, with_scores=False, widths=None, weights=None):
    x, codebook = x.contiguous(), codebook.contiguous()
    shape = x.shape[:-1] + (topk,) if topk > 1 else x.shape[:-1]
    indices = x.new_empty(*shape or [()], dtype=torch.int64)  # sizes one by one: half the time of a Size
    # The kernel keeps up to 64 scores of a row on its own stack.
    scores = codebook.new_empty(shape) if with_scores or topk > 64 else None
    tables = tables_of(widths or (x.shape[-1],), weights or (1.0,), metric)
    lo, hi = window or (0, codebook.shape[-2])
    core, where = runs_on(x)
    _, bad = core.nearest_code(x, codebook, tables, topk, lo, hi, indices, scores, *where)
    warn_non_finite("shared_nearest_code" if widths else "nearest_code", bad)
    return [indices, scores] if with_scores else [indices]


def _nearest_code_fake(x, codebook, metric, topk=1, window=None, with_scores=False, widths=None, weights=None):
    shape = x.shape[:-1] + (topk,) if topk > 1 else x.shape[:-1]
    return [x.new_empty(shape, dtype=torch.int64)] + [codebook.new_empty(shape)] * with_scores


NEAREST_CODE = define(
    "nearest_code(Tensor x, Tensor codebook, str metric, int topk=1, SymInt[]? window=None, bool with_scores=False, "
    "int[]? widths=None, float[]? weights=None) -> Tensor[]",
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
    op = "nearest_code"
    _check.rows_fit(op, x, codebook)
    _check.metric(op, metric)
    _check.flag(op, "return_scores", return_scores)
    lo, hi = (0, codebook.shape[-2]) if window is None else _window(op, window, codebook.shape[-2])
    if not 1 <= _check.integer(op, "topk", topk) <= hi - lo:
        raise ValueError(f"{op}: topk: wanted 1 to {hi - lo} codes of the window, got {topk}")
    if not use_native(op, backend, x, codebook):
        _check.warn_about_rows(op, x)
        return reference.nearest_code(x, codebook, metric=metric, topk=topk, window=window, return_scores=return_scores)
    codebook = in_type(codebook, real(x, codebook))
    found = NEAREST_CODE(constant(x), constant(codebook), metric, topk, window, return_scores)
    return tuple(found) if return_scores else found[0]


def _window(op: str, window, codes: int) -> tuple[int, int]:
    if isinstance(window, (str, torch.Tensor)) or not isinstance(window, Sequence):
        raise TypeError(f"{op}: window: wanted a pair (lo, hi), got {type(window).__name__}")
    if len(window) != 2:
        raise ValueError(f"{op}: window: wanted a pair (lo, hi), got {len(window)} numbers")
    lo, hi = (_check.integer(op, f"window[{i}]", window[i]) for i in (0, 1))
    if not 0 <= lo < hi <= codes:
        raise ValueError(f"{op}: window: wanted 0 <= lo < hi <= {codes}, got ({lo}, {hi})")
    return lo, hi


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
    if not use_native(op, backend, *xs, *codebooks):
        _check.warn_about_rows(op, *xs)
        return reference.shared_nearest_code(xs, codebooks, metric=metric, weights=weights)
    x, codebook = concatenate([constant(x) for x in xs], [constant(c) for c in codebooks])
    return NEAREST_CODE(x, codebook, metric, 1, None, False, widths, weights)[0]


def concatenate(xs, codebooks) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables that share an index are one table split by widths: rows [..., C], codebook [K, C] of the real type."""
    dtype = real(*xs, *codebooks)
    x = torch.cat(tuple(xs), dim=-1) if len(xs) > 1 else xs[0]
    return x, torch.cat([in_type(c, dtype) for c in codebooks], dim=-1)
