"""quantize and shared_quantize: search, gather, straight-through and loss in one pass, with a closed-form backward."""

import torch

from tokenflow_ext import reference
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import (
    define,
    define_autograd,
    define_backward,
    quietly,
    real,
    runs_on,
    use_native,
    warn_non_finite,
)
from tokenflow_ext.ops.search import concatenate, tables_of

# What a training step asks for beside the result: nothing, the rows of every code, or those and their sums.
NOTHING, HITS, SUMS = 0, 1, 2


def _quantize(
    x, codebook, widths, weights, metric, commitment_weight, codebook_weight, for_backward, statistics=NOTHING
):  # fmt: skip
    x, codebook = x.contiguous(), codebook.contiguous()
    rows, groups, _ = x.shape
    quantized = torch.empty_like(x)
    indices = x.new_empty((rows, groups), dtype=torch.int64)
    loss = codebook.new_empty(())
    # What backward reads: never the codebook, which an EMA may have moved by then, nor the output, which is the user's.
    code_rows = codebook.new_empty(x.shape) if for_backward else None
    code_norms = codebook.new_empty((rows, groups, len(widths))) if for_backward and metric == "cosine" else None
    searched = codebook.new_empty(x.shape) if statistics == SUMS else None
    core, where = runs_on(x)
    _, bad = core.quantize(
        x, codebook, tables_of(widths, weights, metric), commitment_weight + codebook_weight, quantized, indices, loss,
        searched, code_rows, code_norms, *where,
    )  # fmt: skip
    warn_non_finite("quantize", bad)
    counts = codebook.new_empty(codebook.shape[:2]) if statistics != NOTHING else None
    sums = torch.empty_like(codebook) if statistics == SUMS else None
    if statistics != NOTHING:
        core.code_statistics(x if sums is None else searched, indices, counts, sums, *quietly(where))
    # Each output needs storage of its own, empty ones too.
    kept = (codebook.new_empty(0) if t is None else t for t in (code_rows, code_norms, counts, sums))
    return quantized, indices, loss, *kept


def _quantize_fake(
    x, codebook, widths, weights, metric, commitment_weight, codebook_weight, for_backward, statistics=NOTHING
):  # fmt: skip
    rows, groups, _ = x.shape
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, groups), dtype=torch.int64),
        codebook.new_empty(()),
        codebook.new_empty(x.shape if for_backward else (0,)),
        codebook.new_empty((rows, groups, len(widths)) if for_backward and metric == "cosine" else (0,)),
        codebook.new_empty(codebook.shape[:2] if statistics != NOTHING else (0,)),
        codebook.new_empty(codebook.shape if statistics == SUMS else (0,)),
    )


def _quantize_backward(
    x, code_rows, code_norms, indices, grad_quantized, grad_loss, codes, widths, metric, commitment_weight, codebook_weight,
    wants_x, wants_codebook,
):  # fmt: skip
    x = x.contiguous()
    grad_quantized = grad_quantized.contiguous() if grad_quantized is not None else None
    grad_loss = grad_loss.contiguous() if grad_loss is not None else None
    grad_x = torch.empty_like(x) if wants_x else None
    grad_codebook = code_rows.new_empty((x.shape[1], codes, x.shape[2])) if wants_codebook else None
    core, where = runs_on(x)
    core.quantize_backward(
        x, code_rows, code_norms, indices, grad_quantized, grad_loss, tables_of(widths, [1.0] * len(widths), metric),
        commitment_weight, codebook_weight, grad_x, grad_codebook, *where,
    )  # fmt: skip
    return grad_x if wants_x else x.new_empty(0), grad_codebook if wants_codebook else x.new_empty(0)


def _quantize_backward_fake(
    x, code_rows, code_norms, indices, grad_quantized, grad_loss, codes, widths, metric, commitment_weight, codebook_weight,
    wants_x, wants_codebook,
):  # fmt: skip
    grad_codebook = code_rows.new_empty((x.shape[1], codes, x.shape[2])) if wants_codebook else x.new_empty(0)
    return x.new_empty(x.shape if wants_x else (0,)), grad_codebook


def _setup(ctx, inputs, output):
    x, codebook, widths, weights, metric, commitment_weight, codebook_weight, *_ = inputs
    _, indices, _, code_rows, code_norms, counts, sums = output
    ctx.mark_non_differentiable(indices, code_rows, code_norms, counts, sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, code_rows, code_norms, indices)
    ctx.options = (codebook.shape[1], widths, metric, commitment_weight, codebook_weight)


def _backward(ctx, grad_quantized, grad_indices, grad_loss, *_):
    x, code_rows, code_norms, indices = ctx.saved_tensors
    wants_x, wants_codebook = ctx.needs_input_grad[:2]
    if grad_quantized is None and grad_loss is None:
        return (None,) * 9
    # Straight-through values send nothing to the codebook.
    reaches_codebook = wants_codebook and grad_loss is not None
    grad_x, grad_codebook = torch.ops.tokenflow_ext.quantize_backward(
        x, code_rows, code_norms, indices, grad_quantized, grad_loss, *ctx.options, wants_x, reaches_codebook
    )
    return grad_x if wants_x else None, grad_codebook if reaches_codebook else None, *(None,) * 7


define(
    "quantize(Tensor x, Tensor codebook, int[] widths, float[] weights, str metric, float commitment_weight, "
    "float codebook_weight, bool for_backward, int statistics=0) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
define_backward(
    "quantize_backward(Tensor x, Tensor code_rows, Tensor code_norms, Tensor indices, Tensor? grad_quantized, "
    "Tensor? grad_loss, SymInt codes, int[] widths, str metric, float commitment_weight, float codebook_weight, "
    "bool wants_x, bool wants_codebook) -> (Tensor, Tensor)",
    _quantize_backward,
    _quantize_backward_fake,
)
define_autograd("quantize", _setup, _backward)


def _call(x, codebook, *options, statistics):
    for_backward = torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad)
    return torch.ops.tokenflow_ext.quantize(x, codebook, *options, for_backward, statistics)


def quantize(
    x: torch.Tensor,
    codebook: torch.Tensor,
    *,
    metric: str = "cosine",
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    backend: str = "auto",
) -> Quantized:
    """Nearest code, straight-through, and loss = codebook_weight mean((q - sg y)^2) + commitment_weight mean((sg q - y)^2).

    y is the row as searched (unit for cosine), q its code (unit for cosine). `quantized` is q, with d quantized / dy = 1;
    it sends no gradient to the codebook, which learns from the loss alone. Nothing of size N x K exists, forward or
    backward.

    Args:
        x: rows [..., D] for a codebook [K, D], or [..., G, D] for [G, K, D]; any float type.
        codebook: codes of any float type; not normalised in place.
        metric: "cosine", "l2" or "dot".
        commitment_weight: weight of the term that moves x.
        codebook_weight: weight of the term that moves the codebook; 0 where an EMA moves it.
        backend: "auto", "native" or "reference".

    Returns:
        Quantized(quantized in x's shape and type, int64 ids [...] (or [..., G]), 0-dim loss).

    Raises:
        ValueError, TypeError: a sentence with op, argument, wanted, got.
        RuntimeError: a second derivative.

    Source: van den Oord et al., 1711.00937; unit codes as in TokenFlow, 2412.03069.

    Example:
        >>> x = torch.tensor([[2.0, 0.1]], requires_grad=True)
        >>> quantized, indices, loss = quantize(x, torch.tensor([[0.0, 3.0], [5.0, 0.0]]))
        >>> quantized.detach(), indices
        (tensor([[1., 0.]]), tensor([1]))
    """
    options = {"commitment_weight": commitment_weight, "codebook_weight": codebook_weight, "backend": backend}
    return quantize_and_count(x, codebook, NOTHING, metric=metric, **options)[0]


def quantize_and_count(x, codebook, statistics, *, metric, commitment_weight, codebook_weight, backend):
    """`quantize`, and what a training step wants of its rows: (Quantized, counts [G, K], sums [G, K, C] of the rows as searched).

    `statistics` is NOTHING, HITS or SUMS; what was not asked for is empty, and both are None where the twin ran.
    """
    rows, table = _check.rows_and_table("quantize", x, codebook)
    _check.metric("quantize", metric)
    commitment_weight = _check.non_negative("quantize", "commitment_weight", commitment_weight)
    codebook_weight = _check.non_negative("quantize", "codebook_weight", codebook_weight)
    options = {"metric": metric, "commitment_weight": commitment_weight, "codebook_weight": codebook_weight}
    if not use_native("quantize", backend, x, codebook):
        _check.warn_about_rows("quantize", rows)
        return reference.quantize(x, codebook, **options), None, None
    table = table.to(real(x, codebook))
    options = [x.shape[-1]], [1.0], metric, commitment_weight, codebook_weight
    out = _call(rows, table, *options, statistics=statistics)
    return Quantized(out[0].reshape(x.shape), out[1].reshape(x.shape[:-1]), out[2]), *out[5:]


def shared_quantize(
    xs,
    codebooks,
    *,
    metric: str = "cosine",
    weights=None,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    backend: str = "auto",
) -> Quantized:
    """`quantize` with one index over T tables: argmin_k sum_t weights[t] d_t.

    The loss is the mean over all rows and the channels of all tables; `weights` decide the index, not the loss.

    Args:
        xs: T tensors [..., D_t] of one type.
        codebooks: T tables [K, D_t].
        metric: "cosine", "l2" or "dot", the same for every table; rows and codes are unit per table for cosine.
        weights: T numbers >= 0, 1 each by default.
        commitment_weight: weight of the term that moves xs.
        codebook_weight: weight of the term that moves the codebooks.
        backend: "auto", "native" or "reference".

    Returns:
        Quantized(tuple of T tensors [..., D_t], int64 ids [...], 0-dim loss).

    Raises:
        ValueError, TypeError: a sentence with op, argument, wanted, got.
        RuntimeError: a second derivative.

    Source: TokenFlow, arXiv 2412.03069, section 3.1; losses as in its released training.

    Example:
        >>> xs = torch.randn(5, 32), torch.randn(5, 8)
        >>> (semantic, pixel), indices, loss = shared_quantize(xs, (torch.randn(64, 32), torch.randn(64, 8)))
        >>> semantic.shape, pixel.shape, indices.shape
        (torch.Size([5, 32]), torch.Size([5, 8]), torch.Size([5]))
    """
    options = {"commitment_weight": commitment_weight, "codebook_weight": codebook_weight, "backend": backend}
    return shared_quantize_and_count(xs, codebooks, NOTHING, metric=metric, weights=weights, **options)[0]


def shared_quantize_and_count(
    xs, codebooks, statistics, *, metric, weights, commitment_weight, codebook_weight, backend
):  # fmt: skip
    """`quantize_and_count` over T tables, whose channels lie side by side in the sums."""
    op = "shared_quantize"
    widths, weights = _check.shared_tables(op, xs, codebooks, weights)
    _check.metric(op, metric)
    commitment_weight = _check.non_negative(op, "commitment_weight", commitment_weight)
    codebook_weight = _check.non_negative(op, "codebook_weight", codebook_weight)
    options = {"metric": metric, "commitment_weight": commitment_weight, "codebook_weight": codebook_weight}
    if not use_native(op, backend, *xs, *codebooks):
        _check.warn_about_rows(op, *xs)
        return reference.shared_quantize(xs, codebooks, weights=weights, **options), None, None
    x, codebook = concatenate(xs, codebooks)
    x = x.reshape(_check.count(x.shape[:-1]), 1, x.shape[-1])
    options = widths, weights, metric, commitment_weight, codebook_weight
    out = _call(x, codebook[None], *options, statistics=statistics)
    parts = out[0].split(widths, dim=-1)
    quantized = tuple(part.reshape(x.shape) for part, x in zip(parts, xs))
    return Quantized(quantized, out[1].reshape(xs[0].shape[:-1]), out[2]), *out[5:]
