"""quantize and shared_quantize: search, gather, straight-through and loss in one pass, with a closed-form backward."""

import torch

from tokenflow_ext import reference
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import in_type, quietly, real, runs_on, use_native, warn_non_finite
from tokenflow_ext.ops._operator import define, define_autograd, define_backward, not_differentiable, once
from tokenflow_ext.ops.search import concatenate, tables_of

# What a training step asks for beside the result: nothing, the rows of every code, or those and their sums.
NOTHING, HITS, SUMS = 0, 1, 2


def _quantize(
    x, codebook, widths, weights, metric, commitment_weight, codebook_weight, for_backward, statistics=NOTHING
):  # fmt: skip
    x, codebook = x.contiguous(), codebook.contiguous()
    # What backward reads: never the codebook, which an EMA may have moved by then, nor the output, which is the user's.
    outputs = _quantize_fake(
        x, codebook, widths, weights, metric, commitment_weight, codebook_weight, for_backward, statistics
    )
    quantized, indices, loss, code_rows, code_norms, counts, sums = outputs
    searched = codebook.new_empty(x.shape) if statistics == SUMS else None
    core, where = runs_on(x)
    _, bad = core.quantize(
        x, codebook, tables_of(widths, weights, metric), commitment_weight + codebook_weight, quantized, indices, loss,
        searched, code_rows, code_norms, *where,
    )  # fmt: skip
    warn_non_finite("shared_quantize" if len(widths) > 1 else "quantize", bad)
    if statistics != NOTHING:
        core.code_statistics(x if sums is None else searched, indices, counts, sums, *quietly(where))
    return outputs


def _quantize_fake(
    x, codebook, widths, weights, metric, commitment_weight, codebook_weight, for_backward, statistics=NOTHING
):  # fmt: skip
    lead = x.shape[:-1]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),  # half the time of new_empty
        x.new_empty(lead, dtype=torch.int64),
        codebook.new_empty(()),
        torch.empty_like(x, dtype=codebook.dtype, memory_format=torch.contiguous_format) if for_backward else None,
        codebook.new_empty((*lead, len(widths))) if for_backward and metric == "cosine" else None,
        codebook.new_empty(codebook.shape[:-1]) if statistics != NOTHING else None,
        codebook.new_empty(codebook.shape) if statistics == SUMS else None,
    )


def _quantize_backward(
    x, code_rows, code_norms, indices, grad_quantized, grad_loss, shape, widths, metric, commitment_weight, codebook_weight,
    wants_x, wants_codebook,
):  # fmt: skip
    x = x.contiguous()
    grad_quantized = grad_quantized.contiguous() if grad_quantized is not None else None
    grad_loss = grad_loss.contiguous() if grad_loss is not None else None
    grad_x = torch.empty_like(x) if wants_x else None
    grad_codebook = code_rows.new_empty(shape) if wants_codebook else None
    core, where = runs_on(x)
    core.quantize_backward(
        x, code_rows, code_norms, indices, grad_quantized, grad_loss, tables_of(widths, [1.0] * len(widths), metric),
        commitment_weight, codebook_weight, grad_x, grad_codebook, *where,
    )  # fmt: skip
    return grad_x, grad_codebook


def _quantize_backward_fake(
    x, code_rows, code_norms, indices, grad_quantized, grad_loss, shape, widths, metric, commitment_weight, codebook_weight,
    wants_x, wants_codebook,
):  # fmt: skip
    return x.new_empty(x.shape) if wants_x else None, code_rows.new_empty(shape) if wants_codebook else None


def _setup(ctx, inputs, output):
    x, codebook, widths, weights, metric, commitment_weight, codebook_weight, *_ = inputs
    _, indices, _, code_rows, code_norms, counts, sums = output
    not_differentiable(ctx, indices, code_rows, code_norms, counts, sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, code_rows, code_norms, indices)
    ctx.options = (codebook.shape, widths, metric, commitment_weight, codebook_weight)


def _backward(ctx, grad_quantized, grad_indices, grad_loss, *_):
    x, code_rows, code_norms, indices = ctx.saved_tensors
    wants_x, wants_codebook = ctx.needs_input_grad[:2]
    if grad_quantized is None and grad_loss is None:
        return (None,) * 9
    # Straight-through values send nothing to the codebook.
    reaches_codebook = wants_codebook and grad_loss is not None
    grad_x, grad_codebook = QUANTIZE_BACKWARD(
        x, once(code_rows), code_norms, indices, grad_quantized, grad_loss, *ctx.options, wants_x, reaches_codebook
    )
    return grad_x if wants_x else None, grad_codebook if reaches_codebook else None, *(None,) * 7


QUANTIZE = define(
    "quantize(Tensor x, Tensor codebook, int[] widths, float[] weights, str metric, float commitment_weight, "
    "float codebook_weight, bool for_backward, int statistics=0) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
QUANTIZE_BACKWARD = define_backward(
    "quantize_backward(Tensor x, Tensor code_rows, Tensor? code_norms, Tensor indices, Tensor? grad_quantized, "
    "Tensor? grad_loss, SymInt[] shape, int[] widths, str metric, float commitment_weight, float codebook_weight, "
    "bool wants_x, bool wants_codebook) -> (Tensor, Tensor)",
    _quantize_backward,
    _quantize_backward_fake,
)
define_autograd(QUANTIZE, _setup, _backward)


def _call(x, codebook, *options, statistics):
    for_backward = torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad)
    return QUANTIZE(x, codebook, *options, for_backward, statistics)


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
    """`quantize`, and what a training step wants of its rows: (Quantized, counts, sums of the rows as searched).

    `statistics` is NOTHING, HITS or SUMS; counts have the codebook's shape without its last axis, sums all of it. What was not
    asked for is empty or None, and both are None where the twin ran.
    """
    _check.rows_fit("quantize", x, codebook)
    _check.metric("quantize", metric)
    commitment_weight = _check.non_negative("quantize", "commitment_weight", commitment_weight)
    codebook_weight = _check.non_negative("quantize", "codebook_weight", codebook_weight)
    options = {"metric": metric, "commitment_weight": commitment_weight, "codebook_weight": codebook_weight}
    if not use_native("quantize", backend, x, codebook):
        _check.warn_about_rows("quantize", x)
        return reference.quantize(x, codebook, **options), None, None
    options = [x.shape[-1]], [1.0], metric, commitment_weight, codebook_weight
    out = _call(x, in_type(codebook, real(x, codebook)), *options, statistics=statistics)
    return Quantized(*out[:3]), *out[5:]


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
    options = widths, weights, metric, commitment_weight, codebook_weight
    out = _call(x, codebook, *options, statistics=statistics)
    return Quantized(out[0].split(widths, dim=-1), *out[1:3]), *out[5:]
