"""Native kernels for vector quantization under a thin PyTorch layer.

`tokenflow_ext.ops` holds stateless functions, `tokenflow_ext.quantize` drop-in modules, `tokenflow_ext.compat`
the originals' classes over them, `tokenflow_ext.reference` the pure-PyTorch twin of every op.
"""

import pkgutil

import torch  # before _C: one libgomp is mapped, torch's

# In a source tree that shadows the installed package the compiled core is found in the latter.
__path__ = pkgutil.extend_path(__path__, __name__)

from tokenflow_ext import ops, quantize, reference

from tokenflow_ext import compat  # isort: skip (quantize comes first, its convert needs compat)
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops._native import build_info
from tokenflow_ext.ops._search_path import search_precision, trace

__version__ = "0.1.0"
__all__ = ["Quantized", "build_info", "compat", "ops", "quantize", "reference", "search_precision", "trace"]

del pkgutil, torch
