"""Layers that choose codes: float32 (float64) under half() and autocast, so that the tokens stay those of float32."""

import torch
from torch import Tensor, nn

from tokenflow_ext.ops import _check
from tokenflow_ext.quantize._codebook import keep_precision


class _Exact(nn.Module):
    def _apply(self, fn, recurse=True):
        return keep_precision(self, super()._apply, fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return super().forward(x)


class Linear(_Exact, nn.Linear):
    """nn.Linear in its own precision."""


class LayerNorm(_Exact, nn.LayerNorm):
    """nn.LayerNorm in its own precision."""


class RMSNorm(_Exact, nn.RMSNorm):
    """nn.RMSNorm in its own precision."""


def without_autocast(x: Tensor):
    """A region of x's device where autocast is off."""
    return torch.autocast(x.device.type, enabled=False)


def mean_square(a: Tensor, b: Tensor, good: Tensor) -> Tensor:
    """mean((a - b)^2) over all entries of [..., D]; rows where `good` [...] is False add 0, and no rows give 0."""
    difference = torch.where(good.unsqueeze(-1), a - b, 0.0)
    return difference.square().sum() / max(_check.count(difference.shape), 1)
