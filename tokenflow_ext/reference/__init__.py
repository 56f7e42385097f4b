"""The pure-PyTorch twin of every op, of the same name and signature."""

from tokenflow_ext.reference.entropy import entropy_loss
from tokenflow_ext.reference.multiscale import (
    multiscale_decode,
    multiscale_inputs,
    multiscale_quantize,
    multiscale_rows,
)
from tokenflow_ext.reference.quantize import (
    code_statistics,
    ema_update_,
    lookup,
    nearest_code,
    normalize_rows,
    quantize,
    shared_lookup,
    shared_nearest_code,
    shared_quantize,
)
from tokenflow_ext.reference.soft import soft_quantize

__all__ = [
    "code_statistics",
    "ema_update_",
    "entropy_loss",
    "lookup",
    "multiscale_decode",
    "multiscale_inputs",
    "multiscale_quantize",
    "multiscale_rows",
    "nearest_code",
    "normalize_rows",
    "quantize",
    "shared_lookup",
    "shared_nearest_code",
    "shared_quantize",
    "soft_quantize",
]
