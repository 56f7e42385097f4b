"""soft_quantize: the hard code forward, the gradient of its softmax backward; no N x K matrix, forward or backward."""

import torch

from tokenflow_ext import reference
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import real, runs_on, use_native
from tokenflow_ext.ops._operator import define, define_autograd, define_backward
from tokenflow_ext.ops._softmax import best_codes, left_out
from tokenflow_ext.ops.lookup import LOOKUP, LOOKUP_BACKWARD


def _soft_quantize(x, keys, values, good):
    ids = best_codes("soft_quantize", x, keys, good)
    rows = LOOKUP(ids.clamp_min(0), values)
    return torch.where(good.unsqueeze(-1), rows, torch.nan), ids


def _soft_quantize_fake(x, keys, values, good):
    rows, groups = x.shape[:2]
    return x.new_empty((rows, groups, values.shape[-1])), x.new_empty((rows, groups), dtype=torch.int64)


def _soft_quantize_backward(x, keys, values, ids, grad, wants_x, wants_keys):
    x, keys, values, grad = x.contiguous(), keys.contiguous(), values.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x) if wants_x else None
    grad_keys = torch.empty_like(keys) if wants_keys else None
    core, where = runs_on(x)
    core.soft_quantize_backward(x, keys, values, ids, grad, grad_x, grad_keys, *where)
    return grad_x, grad_keys


def _soft_quantize_backward_fake(x, keys, values, ids, grad, wants_x, wants_keys):
    return x.new_empty(x.shape) if wants_x else None, x.new_empty(keys.shape) if wants_keys else None


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    x, keys, values, ids = ctx.saved_tensors
    wants_x, wants_keys, wants_values = ctx.needs_input_grad[:3]
    grad_x = grad_keys = grad_values = None
    if wants_values:
        passed = torch.where(ids.unsqueeze(-1) >= 0, grad, 0.0)
        grad_values = LOOKUP_BACKWARD(ids.clamp_min(0), passed, values.shape)
    if wants_x or wants_keys:
        grad_x, grad_keys = SOFT_QUANTIZE_BACKWARD(x, keys, values, ids, grad, wants_x, wants_keys)
    return grad_x if wants_x else None, grad_keys if wants_keys else None, grad_values, None


SOFT_QUANTIZE = define(
    "soft_quantize(Tensor x, Tensor keys, Tensor values, Tensor good) -> (Tensor, Tensor)",
    _soft_quantize,
    _soft_quantize_fake,
)
SOFT_QUANTIZE_BACKWARD = define_backward(
    "soft_quantize_backward(Tensor x, Tensor keys, Tensor values, Tensor ids, Tensor grad, bool wants_x, bool wants_keys)"
    " -> (Tensor, Tensor)",
    _soft_quantize_backward,
    _soft_quantize_backward_fake,
)
define_autograd(SOFT_QUANTIZE, _setup, _backward)


def soft_quantize(
    x: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """values[argmax_k s_k] forward, sum_k softmax(s)_k values_k backward, with s_k = scale x.keys_k + bias_k.

    So every code gets a gradient: with g the upstream gradient, a = g values^T and ds = p (a - <a>_p), dx = scale ds keys,
    dkeys = scale ds^T x, dbias = sum ds; the values, as used, get onehot^T g. On equal logits the lowest id wins. Nothing of
    size N x K exists, forward or backward; probabilities under e^-20 / K (e^-44 / K in float64) may count as 0.

    Args:
        x: rows [..., D] of any float type, computed in float32 (float64 for float64).
        keys: [K, D]; pass the same tensor as values for IBQ.
        values: [K, Dv].
        scale: of the products.
        bias: [K], added to the logits; none by default.
        backend: "auto", "native" or "reference".

    Returns:
        (quantized [..., Dv] of x's type, int64 ids [...]). A row with NaN or inf gets id 0, NaN and no gradient; a code of
        which key, bias or value is not finite has probability 0 and is chosen only where all are so.

    Raises:
        ValueError, TypeError: a sentence with op, argument, wanted, got.
        RuntimeError: a second derivative.

    Source: IBQ, 2412.02692 (keys = values = codebook, scale 1); CODA, 2503.17760 (projected keys and values, 1 / sqrt D).

    Example:
        >>> x, codebook = torch.tensor([[1.0, 0.2]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]], requires_grad=True)
        >>> quantized, indices = soft_quantize(x, codebook, codebook)
        >>> quantized.detach(), indices
        (tensor([[3., 0.]]), tensor([1]))
        >>> quantized.sum().backward()
        >>> bool((codebook.grad[0] != 0).all())
        True
    """
    op = "soft_quantize"
    _check.floating(op, "x", x)
    for name, table in (("keys", keys), ("values", values)):
        _check.table(op, name, table, grouped=False)
    codes, width = keys.shape
    if x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"{op}: x: wanted [..., {width}] for keys {list(keys.shape)}, got {list(x.shape)}")
    if values.shape[0] != codes:
        raise ValueError(f"{op}: values: wanted {codes} rows as in keys, got {values.shape[0]}")
    scale = _check.number(op, "scale", scale)
    if not abs(scale) < float("inf"):
        raise ValueError(f"{op}: scale: wanted a finite number, got {scale}")
    if bias is not None and tuple(_check.floating(op, "bias", bias).shape) != (codes,):
        raise ValueError(f"{op}: bias: wanted [{codes}], got {list(bias.shape)}")
    biases = [] if bias is None else [bias]
    _check.same_device(op, x=x, keys=keys, values=values, **({} if bias is None else {"bias": bias}))
    if not use_native(op, backend, x, keys, values, *biases):
        _check.warn_about_rows(op, x)
        return reference.soft_quantize(x, keys, values, scale=scale, bias=bias)
    dtype = real(x, keys, values, *biases)
    (rows,), good = left_out(x.to(dtype).reshape(_check.count(x.shape[:-1]), 1, width))
    parts, intact = left_out(keys.to(dtype), values.to(dtype), *(b.to(dtype).unsqueeze(1) for b in biases))
    table = parts[0] if bias is None else torch.cat([parts[0], parts[2]], dim=-1)
    table, values = (torch.where(intact.unsqueeze(1), part, torch.nan) for part in (table, parts[1]))
    rows = rows if scale == 1 else rows * scale
    if bias is not None:
        rows = torch.cat([rows, rows.new_ones((rows.shape[0], 1, 1))], dim=-1)
    quantized, ids = SOFT_QUANTIZE(rows, table.unsqueeze(0), values.unsqueeze(0), good)
    shape = x.shape[:-1]
    return quantized.reshape(*shape, values.shape[1]).to(x.dtype), ids.clamp_min(0).reshape(shape)
