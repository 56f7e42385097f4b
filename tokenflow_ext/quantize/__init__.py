"""Drop-in quantizer modules: one codebook, grouped codebooks, TokenFlow's shared index, and multi-scale around either."""

from tokenflow_ext._types import Quantized
from tokenflow_ext.quantize.multiscale import MultiScaleQuantizer
from tokenflow_ext.quantize.vector import SharedIndexQuantizer, VectorQuantizer

from tokenflow_ext.quantize._convert import convert  # isort: skip (it needs the modules above)

__all__ = ["MultiScaleQuantizer", "Quantized", "SharedIndexQuantizer", "VectorQuantizer", "convert"]
