"""How convolutions keep their weights: channels last in eval mode, as their maps are.

A convolution of channels-last maps wants its weight [out, in, k, k] in that order, too, and PyTorch copies one that lies otherwise
in every call: 137 MB read and written for an encode of TokenFlow-B. Nothing but the order in memory changes: values, results, state
dicts and parameter objects stay. In training mode weights lie as they did before, since FSDP2 shards contiguous parameters only.
"""

from __future__ import annotations

import torch
from torch import nn

TURNED = "_turned_channels_last"


def follow_mode(module: nn.Module) -> None:
    """Turn the weights of the convolutions inside to the layout of the module's mode.

    Weights that somebody else turned, shards, and those of a device that computes nothing (meta) are left alone.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d) or type(layer.weight) is not nn.Parameter or layer.weight.is_meta:
            continue
        weight = layer.weight.detach()
        turned = weight.is_contiguous(memory_format=torch.channels_last)
        if not module.training and weight.is_contiguous() and not turned:
            layer.weight.data = weight.contiguous(memory_format=torch.channels_last)
            setattr(layer, TURNED, True)
        elif module.training and layer.__dict__.pop(TURNED, False):
            layer.weight.data = weight.contiguous()
