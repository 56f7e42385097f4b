"""Registration of multiscale_rows, multiscale_decode and multiscale_chain: the ops that follow given ids."""

import torch

from tokenflow_ext.ops._multiscale_common import cells_of, contiguous, grid_rows, norms_space, refuse_outside
from tokenflow_ext.ops._native import runs_on
from tokenflow_ext.ops._operator import define, define_autograd, define_backward, once
from tokenflow_ext.ops.search import tables_of


def _tables(widths, unit_codes: bool):
    return tables_of(widths, [1.0] * len(widths), "dot", unit_codes)


def _rows(features, indices, codebook, weight, bias, grids, widths, unit_codes, ratio):
    features, indices, codebook, weight, bias = contiguous(features, indices, codebook, weight, bias)
    rows, kept = codebook.new_empty((*indices.shape, codebook.shape[1])), codebook.new_empty(indices.shape)
    core, where = runs_on(codebook)
    outside, _ = core.multiscale_rows(
        features, indices, codebook, _tables(widths, unit_codes), grid_rows(grids), weight, bias, ratio, rows, kept, *where
    )  # fmt: skip
    refuse_outside("multiscale_rows", outside, codebook.shape[0])
    return rows, kept


def _rows_fake(features, indices, codebook, weight, bias, grids, widths, unit_codes, ratio):
    return codebook.new_empty((*indices.shape, features.shape[1])), codebook.new_empty(indices.shape)


def _rows_backward(kept, grad_rows, grids, height, width):
    grad_features = grad_rows.new_empty((grad_rows.shape[0], grad_rows.shape[2], height, width))
    core, where = runs_on(grad_rows)
    core.multiscale_rows_backward(kept, grad_rows.contiguous(), grid_rows(grids), grad_features, *where)
    return grad_features


def _rows_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.options = (inputs[5], *inputs[0].shape[2:])
    ctx.dtype = inputs[0].dtype


def _rows_autograd(ctx, grad_rows, _):
    grad = MULTISCALE_ROWS_BACKWARD(*ctx.saved_tensors, grad_rows, *ctx.options)
    return grad.to(ctx.dtype), *(None,) * 8


MULTISCALE_ROWS = define(
    "multiscale_rows(Tensor features, Tensor indices, Tensor codebook, Tensor? weight, Tensor? bias, int[] grids, "
    "int[] widths, bool unit_codes, float ratio) -> (Tensor, Tensor)",
    _rows,
    _rows_fake,
)
MULTISCALE_ROWS_BACKWARD = define_backward(
    "multiscale_rows_backward(Tensor kept, Tensor grad_rows, int[] grids, SymInt height, SymInt width) -> Tensor",
    _rows_backward,
    lambda kept, grad_rows, grids, height, width: grad_rows.new_empty(
        (kept.shape[0], grad_rows.shape[2], height, width)
    ),
)
define_autograd(MULTISCALE_ROWS, _rows_setup, _rows_autograd)


def _input_rows(grids, length: int) -> int:
    """Rows that a prefix of `length` ids gives: those of scales 2 .. min(p + 1, S)."""
    cells = cells_of(grids)
    covered = scales = 0
    while covered < length:
        covered += cells[scales]
        scales += 1
    return sum(cells[1 : scales + 1]) if scales else 0


def _decode_shape(indices, codebook, grids, height, width, as_inputs):
    if as_inputs:
        return indices.shape[0], _input_rows(grids, indices.shape[1]), codebook.shape[1]
    return indices.shape[0], codebook.shape[1], height, width


def _decode(indices, codebook, weight, bias, grids, height, width, widths, unit_codes, ratio, as_inputs):
    indices, codebook, weight, bias = contiguous(indices, codebook, weight, bias)
    out = codebook.new_empty(_decode_shape(indices, codebook, grids, height, width, as_inputs))
    code_rows = codebook.new_empty((*indices.shape, codebook.shape[1]))
    code_norms = norms_space(codebook, (*indices.shape, len(widths)), unit_codes)
    core, where = runs_on(codebook)
    outside, _ = core.multiscale_decode(
        indices, codebook, _tables(widths, unit_codes), grid_rows(grids), height, width, weight, bias, ratio,
        None if as_inputs else out, out if as_inputs else None, code_rows, code_norms, *where,
    )  # fmt: skip
    refuse_outside("multiscale_inputs" if as_inputs else "multiscale_decode", outside, codebook.shape[0])
    return out, code_rows, code_norms


def _decode_fake(indices, codebook, weight, bias, grids, height, width, widths, unit_codes, ratio, as_inputs):
    return (
        codebook.new_empty(_decode_shape(indices, codebook, grids, height, width, as_inputs)),
        codebook.new_empty((*indices.shape, codebook.shape[1])),
        codebook.new_empty((*indices.shape, len(widths))),
    )


def _decode_backward(
    indices, code_rows, code_norms, grad, weight, bias, codes, grids, height, width, widths, unit_codes, ratio, as_inputs
):  # fmt: skip
    indices, grad, weight, bias = contiguous(indices, grad, weight, bias)
    grad_codebook = code_rows.new_empty((codes, code_rows.shape[2]))
    grad_phi = (None, None) if weight is None else (torch.empty_like(weight), torch.empty_like(bias))
    core, where = runs_on(code_rows)
    core.multiscale_decode_backward(
        indices, code_rows, code_norms, None if as_inputs else grad, grad if as_inputs else None,
        _tables(widths, unit_codes), grid_rows(grids), height, width, weight, bias, ratio, grad_codebook, *grad_phi, *where,
    )  # fmt: skip
    return grad_codebook, *grad_phi


def _decode_backward_fake(
    indices, code_rows, code_norms, grad, weight, bias, codes, grids, height, width, widths, unit_codes, ratio, as_inputs
):  # fmt: skip
    empty = code_rows.new_empty
    return (
        empty((codes, code_rows.shape[2])),
        None if weight is None else empty(weight.shape),
        None if bias is None else empty(bias.shape),
    )


def _decode_setup(ctx, inputs, output):
    indices, codebook, weight, bias, *options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(indices, *output[1:], weight, bias)
    ctx.options = (codebook.shape[0], *options)


def _decode_autograd(ctx, grad, *_):
    indices, code_rows, code_norms, weight, bias = ctx.saved_tensors
    grads = MULTISCALE_DECODE_BACKWARD(indices, once(code_rows), code_norms, grad, weight, bias, *ctx.options)
    wanted = ctx.needs_input_grad[1:4]
    return None, *(g if w else None for g, w in zip(grads, wanted)), *(None,) * 7


_OPTIONS = "int[] grids, SymInt height, SymInt width, int[] widths, bool unit_codes, float ratio, bool as_inputs"

MULTISCALE_DECODE = define(
    f"multiscale_decode(Tensor indices, Tensor codebook, Tensor? weight, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _decode,
    _decode_fake,
)
MULTISCALE_DECODE_BACKWARD = define_backward(
    "multiscale_decode_backward(Tensor indices, Tensor code_rows, Tensor code_norms, Tensor grad, Tensor? weight, "
    f"Tensor? bias, SymInt codes, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _decode_backward,
    _decode_backward_fake,
)
define_autograd(MULTISCALE_DECODE, _decode_setup, _decode_autograd)


def _chain(indices, codebook, grids, widths, unit_codes, refine):
    indices, codebook = contiguous(indices, codebook)
    inputs = codebook.new_empty((indices.shape[0], _input_rows(grids, indices.shape[1]), codebook.shape[1]))
    code_rows = codebook.new_empty((*indices.shape, codebook.shape[1]))
    code_norms = norms_space(codebook, (*indices.shape, len(widths)), unit_codes)
    core, where = runs_on(codebook)
    outside, _ = core.multiscale_chain(
        indices, codebook, _tables(widths, unit_codes), grid_rows(grids), refine, inputs, code_rows, code_norms, *where
    )  # fmt: skip
    refuse_outside("multiscale_inputs", outside, codebook.shape[0])
    return inputs, code_rows, code_norms


def _chain_fake(indices, codebook, grids, widths, unit_codes, refine):
    return (
        codebook.new_empty((indices.shape[0], _input_rows(grids, indices.shape[1]), codebook.shape[1])),
        codebook.new_empty((*indices.shape, codebook.shape[1])),
        codebook.new_empty((*indices.shape, len(widths))),
    )


def _chain_backward(indices, code_rows, code_norms, grad_inputs, codes, grids, widths, unit_codes, refine):
    indices, grad_inputs = contiguous(indices, grad_inputs)
    grad_codebook = code_rows.new_empty((codes, code_rows.shape[2]))
    core, where = runs_on(code_rows)
    core.multiscale_chain_backward(
        indices, code_rows, code_norms, grad_inputs, _tables(widths, unit_codes), grid_rows(grids), refine, grad_codebook,
        *where,
    )  # fmt: skip
    return grad_codebook


def _chain_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.options = (inputs[1].shape[0], *inputs[2:])


def _chain_autograd(ctx, grad_inputs, *_):
    indices, code_rows, code_norms = ctx.saved_tensors
    grad = MULTISCALE_CHAIN_BACKWARD(indices, once(code_rows), code_norms, grad_inputs, *ctx.options)
    return None, grad, *(None,) * 4


_CHAIN = "int[] grids, int[] widths, bool unit_codes, int refine"

MULTISCALE_CHAIN = define(
    f"multiscale_chain(Tensor indices, Tensor codebook, {_CHAIN}) -> (Tensor, Tensor, Tensor)", _chain, _chain_fake
)
MULTISCALE_CHAIN_BACKWARD = define_backward(
    "multiscale_chain_backward(Tensor indices, Tensor code_rows, Tensor code_norms, Tensor grad_inputs, SymInt codes, "
    f"{_CHAIN}) -> Tensor",
    _chain_backward,
    lambda indices, code_rows, code_norms, grad_inputs, codes, *_: code_rows.new_empty((codes, code_rows.shape[2])),
)
define_autograd(MULTISCALE_CHAIN, _chain_setup, _chain_autograd)
