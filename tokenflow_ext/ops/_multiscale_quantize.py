"""Registration of multiscale_quantize: allocation, shapes and autograd around the native calls."""

import torch

from tokenflow_ext.ops._multiscale_common import cells_of, contiguous, grid_rows, norms_space
from tokenflow_ext.ops._native import runs_on, warn_non_finite
from tokenflow_ext.ops._operator import define, define_autograd, define_backward, not_differentiable, once
from tokenflow_ext.ops.search import tables_of


def _quantize(
    features, codebook, weight, bias, grids, widths, weights, metric, unit_codes, ratio, accumulated, commitment_weight,
    codebook_weight, keep,
):  # fmt: skip
    features, codebook, weight, bias = contiguous(features, codebook, weight, bias)
    batch, channels = features.shape[:2]
    length = sum(cells_of(grids))
    quantized, loss = torch.empty_like(features), codebook.new_empty(())
    indices = features.new_empty((batch, length), dtype=torch.int64)
    kept = None, None, None
    if keep:
        norms = norms_space(codebook, (batch, length, len(widths)), unit_codes)
        kept = codebook.new_empty((batch, length, channels)), codebook.new_empty((batch, length, channels)), norms
    core, where = runs_on(features)
    _, bad = core.multiscale_quantize(
        features, codebook, tables_of(widths, weights, metric, unit_codes), grid_rows(grids), weight, bias, ratio, accumulated,
        commitment_weight + codebook_weight, quantized, indices, loss, *kept, *where,
    )  # fmt: skip
    warn_non_finite("multiscale_quantize", bad)
    return quantized, indices, loss, *kept


def _quantize_fake(
    features, codebook, weight, bias, grids, widths, weights, metric, unit_codes, ratio, accumulated, commitment_weight,
    codebook_weight, keep,
):  # fmt: skip
    batch, length = features.shape[0], sum(cells_of(grids))
    return (
        features.new_empty(features.shape),
        features.new_empty((batch, length), dtype=torch.int64),
        codebook.new_empty(()),
        *(codebook.new_empty((batch, length, n)) if keep else None for n in (*features.shape[1:2] * 2, len(widths))),
    )


def _quantize_backward(
    features, indices, rows, code_rows, code_norms, grad_quantized, grad_loss, weight, bias, codes, grids, widths, metric,
    unit_codes, ratio, accumulated, commitment_weight, codebook_weight, wants_features, wants_codebook, wants_phi,
):  # fmt: skip
    features, grad_quantized, weight, bias = contiguous(features, grad_quantized, weight, bias)
    grad_features = torch.empty_like(features) if wants_features else None
    grad_codebook = rows.new_empty((codes, features.shape[1])) if wants_codebook else None
    grad_phi = (torch.empty_like(weight), torch.empty_like(bias)) if wants_phi else (None, None)
    core, where = runs_on(features)
    core.multiscale_quantize_backward(
        features, indices, rows, code_rows, code_norms, grad_quantized, grad_loss,
        tables_of(widths, [1.0] * len(widths), metric, unit_codes), grid_rows(grids), weight, bias, ratio, accumulated,
        commitment_weight, codebook_weight, grad_features, grad_codebook, *grad_phi, *where,
    )  # fmt: skip
    return grad_features, grad_codebook, *grad_phi


def _quantize_backward_fake(
    features, indices, rows, code_rows, code_norms, grad_quantized, grad_loss, weight, bias, codes, grids, widths, metric,
    unit_codes, ratio, accumulated, commitment_weight, codebook_weight, wants_features, wants_codebook, wants_phi,
):  # fmt: skip
    return (
        features.new_empty(features.shape) if wants_features else None,
        rows.new_empty((codes, features.shape[1])) if wants_codebook else None,
        rows.new_empty(weight.shape) if wants_phi else None,
        rows.new_empty(bias.shape) if wants_phi else None,
    )


def _quantize_setup(ctx, inputs, output):
    features, codebook, weight, bias, grids, widths, _, *options, _ = inputs
    _, indices, _, rows, code_rows, code_norms = output
    not_differentiable(ctx, indices, rows, code_rows, code_norms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, indices, rows, code_rows, code_norms, weight, bias)
    ctx.options = (codebook.shape[0], grids, widths, *options)


def _quantize_autograd(ctx, grad_quantized, grad_indices, grad_loss, *_):
    features, indices, rows, *codes, weight, bias = ctx.saved_tensors
    kept = features, indices, once(rows), *codes
    if grad_quantized is None and grad_loss is None:
        return (None,) * 14
    wants_features = ctx.needs_input_grad[0]
    # `quantized` sends nothing to codebooks or phi; phi only lies on the way of the loss on accumulated maps.
    wants_codebook = ctx.needs_input_grad[1] and grad_loss is not None
    wants_phi = weight is not None and any(ctx.needs_input_grad[2:4]) and grad_loss is not None
    grads = MULTISCALE_QUANTIZE_BACKWARD(
        *kept, grad_quantized, grad_loss, weight, bias, *ctx.options, wants_features, wants_codebook, wants_phi
    )
    wanted = (wants_features, wants_codebook, wants_phi, wants_phi)
    return *(g if w else None for g, w in zip(grads, wanted)), *(None,) * 10


_LOOP = "int[] grids, int[] widths, float[] weights, str metric, bool unit_codes, float ratio"

MULTISCALE_QUANTIZE = define(
    f"multiscale_quantize(Tensor features, Tensor codebook, Tensor? weight, Tensor? bias, {_LOOP}, bool accumulated, "
    "float commitment_weight, float codebook_weight, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
MULTISCALE_QUANTIZE_BACKWARD = define_backward(
    "multiscale_quantize_backward(Tensor features, Tensor indices, Tensor rows, Tensor code_rows, Tensor code_norms, "
    "Tensor? grad_quantized, Tensor? grad_loss, Tensor? weight, Tensor? bias, SymInt codes, int[] grids, int[] widths, "
    "str metric, bool unit_codes, float ratio, bool accumulated, float commitment_weight, float codebook_weight, "
    "bool wants_features, bool wants_codebook, bool wants_phi) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantize_backward,
    _quantize_backward_fake,
)
define_autograd(MULTISCALE_QUANTIZE, _quantize_setup, _quantize_autograd)
