"""Stateless functions of vector quantization; each is a torch.library operator with a native CPU kernel."""

from tokenflow_ext.ops._search_path import search_precision, trace  # noqa: F401 (process-wide, not ops)
from tokenflow_ext.ops.entropy import entropy_loss
from tokenflow_ext.ops.lookup import lookup, shared_lookup
from tokenflow_ext.ops.multiscale import multiscale_decode, multiscale_inputs, multiscale_quantize, multiscale_rows
from tokenflow_ext.ops.normalize import normalize_rows
from tokenflow_ext.ops.quantize import quantize, shared_quantize
from tokenflow_ext.ops.search import nearest_code, shared_nearest_code
from tokenflow_ext.ops.soft import soft_quantize
from tokenflow_ext.ops.statistics import code_statistics, ema_update_

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
