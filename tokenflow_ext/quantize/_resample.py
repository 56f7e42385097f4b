"""Area down and bicubic up as the ops resample, for quantizers whose residual is not detached."""

import torch
from torch import Tensor

from tokenflow_ext.quantize._precision import without_autocast
from tokenflow_ext.reference import resample as twin

WEIGHTS = {"area": twin.area_weights, "bicubic": twin.bicubic_weights}


def _weights(rule: str, n_in: int, n_out: int) -> list[list[float]]:
    return WEIGHTS[rule](n_in, n_out)


# What torch.compiler.assume_constant_result does, which as a decorator imports Dynamo: two seconds of every import.
_weights._dynamo_marked_constant = True


def _matrix(rule: str, n_in: int, n_out: int, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a graph holds numbers of its own, not tensors of a cache
        return torch.tensor(_weights(rule, n_in, n_out), dtype=x.dtype, device=x.device)
    return twin._matrix(rule, n_in, n_out, x.dtype, x.device)


def resample(x: Tensor, size: tuple[int, int], rule: str) -> Tensor:
    """M_h x M_w^T for every channel of maps x [B, C, h, w] -> [B, C, *size]; the map itself where the size is its own.

    A value that is not finite reaches, as NaN, those outputs that it has a weight in, and gets no gradient. Unlike
    `reference.resample`, which looks first whether there are any, this one synchronises with nothing.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    rows, columns = (_matrix(rule, n_in, n_out, x) for n_in, n_out in zip(x.shape[2:], size))
    finite = x.isfinite()
    with without_autocast(x):
        clean = rows @ torch.where(finite, x, 0.0) @ columns.T
        touched = (rows != 0).to(x.dtype) @ finite.logical_not().to(x.dtype) @ (columns != 0).to(x.dtype).T > 0
    return torch.where(touched, torch.nan, clean)
