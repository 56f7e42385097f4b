"""lookup and shared_lookup: gather with a deterministic scatter-add backward."""

import torch

from tokenflow_ext import reference
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import check_ids, runs_on, use_native
from tokenflow_ext.ops._operator import define, define_autograd, define_backward


def _lookup(indices, codebook, op="lookup"):
    indices, codebook = indices.contiguous(), codebook.contiguous()
    rows = codebook.new_empty((*indices.shape, codebook.shape[-1]))
    core, where = runs_on(codebook)
    outside, _ = core.lookup(indices, codebook, rows, *where)
    check_ids(op, outside, codebook.shape[-2])
    return rows


def _lookup_backward(indices, grad_rows, shape):
    indices, grad_rows = indices.contiguous(), grad_rows.contiguous()
    grad = grad_rows.new_empty(shape)
    core, where = runs_on(grad_rows)
    core.lookup_backward(indices, grad_rows, grad, *where)
    return grad


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.shape = inputs[1].shape


def _backward(ctx, grad_rows):
    return None, LOOKUP_BACKWARD(ctx.saved_tensors[0], grad_rows, ctx.shape), None


LOOKUP = define(
    'lookup(Tensor indices, Tensor codebook, str op="lookup") -> Tensor',
    _lookup,
    lambda indices, codebook, op="lookup": codebook.new_empty((*indices.shape, codebook.shape[-1])),
)
LOOKUP_BACKWARD = define_backward(
    "lookup_backward(Tensor indices, Tensor grad_rows, SymInt[] shape) -> Tensor",
    _lookup_backward,
    lambda indices, grad_rows, shape: grad_rows.new_empty(shape),
)
define_autograd(LOOKUP, _setup, _backward)


def lookup(indices: torch.Tensor, codebook: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """rows = codebook[indices]; never normalises.

    Args:
        indices: int64 ids [...] for a codebook [K, D], or [..., G] for [G, K, D].
        codebook: codes of any float type.
        backend: "auto", "native" or "reference".

    Returns:
        [..., D] (or [..., G, D]) of the codebook's type. Differentiable once in `codebook`: the gradients of a code's
        rows are added in row order, so the sum does not depend on the thread count.

    Raises:
        ValueError: ids outside the table, wrong shapes.
        TypeError: ids that are not int64, a codebook that is not float.

    Example:
        >>> lookup(torch.tensor([2, 0]), torch.tensor([[1.0], [2.0], [3.0]]))
        tensor([[3.],
                [1.]])
    """
    _check.ids("lookup", "indices", indices)
    _check.table("lookup", "codebook", codebook)
    _check.same_device("lookup", codebook=codebook, indices=indices)
    if codebook.dim() == 3 and (indices.dim() < 1 or indices.shape[-1] != codebook.shape[0]):
        raise ValueError(
            f"lookup: indices: wanted [..., {codebook.shape[0]}] for a codebook {list(codebook.shape)}, got {list(indices.shape)}"
        )
    return _gather("lookup", indices, codebook, backend)


def _gather(op: str, indices: torch.Tensor, codebook: torch.Tensor, backend: str) -> torch.Tensor:
    if not use_native(op, backend, indices, codebook):
        _check.ids_in_range(op, indices, codebook.shape[-2])
        return reference.lookup(indices, codebook)
    return LOOKUP(indices, codebook, op)


def shared_lookup(indices: torch.Tensor, codebooks, *, backend: str = "auto") -> tuple[torch.Tensor, ...]:
    """The rows of T tables under one index: (codebooks[0][indices], codebooks[1][indices], ...).

    Args:
        indices: int64 ids [...].
        codebooks: T tables [K, D_t].
        backend: "auto", "native" or "reference".

    Returns:
        T tensors [..., D_t].

    Raises:
        ValueError, TypeError: a sentence with op, argument, wanted, got.

    Example:
        >>> shared_lookup(torch.tensor([1]), (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])))
        (tensor([[2.]]), tensor([[4.]]))
    """
    op = "shared_lookup"
    _check.ids(op, "indices", indices)
    _check.sequence(op, "codebooks", codebooks)
    for t, codebook in enumerate(codebooks):
        _check.table(op, f"codebooks[{t}]", codebook, grouped=False)
        _check.same_device(op, **{"indices": indices, f"codebooks[{t}]": codebook})
        _check.same_codes(op, codebooks, t)
    return tuple(_gather(op, indices, codebook, backend) for codebook in codebooks)
