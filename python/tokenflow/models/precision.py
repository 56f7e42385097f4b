"""In which type networks compute: the one that the device is fast in, but float32 from the last layer before the codes on.

Rounded to bfloat16, a feature chooses another code, and at a coarse scale that changes all finer ones.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Names of bfloat16 arithmetic: torch's, and those of Linux for x86 and ARM.
BFLOAT16_UNITS = {"avx512_bf16", "avx10_2", "amx_bf16", "bf16"}


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The type that autocast brings speed in: bfloat16 where the device has units for it, else float32.

    A processor without them computes bfloat16 by conversions, a training step of the demo 12 times slower than in float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        # Without a current device of its own the question is about another.
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _has_bfloat16_units() else torch.float32


@functools.cache
def _has_bfloat16_units() -> bool:
    """Whether torch, or in older versions Linux, knows a name of BFLOAT16_UNITS of the processor."""
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(name, False) for name in BFLOAT16_UNITS)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    words = {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}
    return bool(words & BFLOAT16_UNITS)


def autocast(device: torch.device | str, dtype: torch.dtype | None = None) -> torch.autocast:
    """A block in which the networks compute in a type, `fast_dtype` by default."""
    device = torch.device(device)
    dtype = dtype or fast_dtype(device)
    return torch.autocast(device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


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
