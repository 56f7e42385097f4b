"""Area down and bicubic up as the ops resample, for quantizers whose residual is not detached."""

import torch
from torch import Tensor

from tokenflow_ext.reference.resample import _matrix


@torch.compiler.assume_constant_result
def _constant(rule: str, n_in: int, n_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _matrix(rule, n_in, n_out, dtype, device)


def resample(x: Tensor, size: tuple[int, int], rule: str) -> Tensor:
    """M_h x M_w^T for every channel of maps x [B, C, h, w] -> [B, C, *size]; the map itself where the size is its own.

    A value that is not finite reaches, as NaN, those outputs that it has a weight in, and gets no gradient. Unlike
    `reference.resample`, which looks first whether there are any, this one synchronises with nothing.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    rows = _constant(rule, x.shape[2], size[0], x.dtype, x.device)
    columns = _constant(rule, x.shape[3], size[1], x.dtype, x.device)
    finite = x.isfinite()
    clean = rows @ torch.where(finite, x, 0.0) @ columns.T
    touched = (rows != 0).to(x.dtype) @ finite.logical_not().to(x.dtype) @ (columns != 0).to(x.dtype).T > 0
    return torch.where(touched, torch.nan, clean)
