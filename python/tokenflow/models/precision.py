"""Where a model computes in float32 whatever its own or autocast's type: from the last layer before the codes to the codes.

Rounded to bfloat16, a feature chooses another code, and at a coarse scale that changes all finer ones.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.func import functional_call


def full(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A block in which autocast leaves the tensor's device alone; the meta device knows none."""
    if tensor.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def in_full(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) in float32 (float64 for float64) whatever the layer's or autocast's type."""
    weights = dict(layer.named_parameters())
    with without_autocast(x):
        if all(weight.dtype == full(weight).dtype for weight in weights.values()):
            return layer(full(x))
        return functional_call(layer, {name: full(weight) for name, weight in weights.items()}, full(x))
