"""Drop-in quantizer modules: one codebook, grouped codebooks, TokenFlow's shared index, multi-scale around either, and the
quantizers of the related papers out of the same ops."""

from tokenflow_ext._types import Quantized
from tokenflow_ext.quantize.multiscale import MultiScaleQuantizer
from tokenflow_ext.quantize.perturb import perturb_codes
from tokenflow_ext.quantize.prefix import PrefixMultiScaleQuantizer
from tokenflow_ext.quantize.product import ProductQuantizer, disentangle_loss, fold, unfold
from tokenflow_ext.quantize.projected import ProjectedQuantizer
from tokenflow_ext.quantize.residual import ResidualQuantizer
from tokenflow_ext.quantize.sign import SignQuantizer, pack_bits, unpack_bits
from tokenflow_ext.quantize.soft import AttentionQuantizer, IndexPropagationQuantizer
from tokenflow_ext.quantize.soft_multiscale import SoftMultiScaleQuantizer
from tokenflow_ext.quantize.vector import SharedIndexQuantizer, VectorQuantizer

from tokenflow_ext.quantize._convert import convert  # isort: skip (it needs the modules above)

__all__ = [
    "AttentionQuantizer",
    "IndexPropagationQuantizer",
    "MultiScaleQuantizer",
    "PrefixMultiScaleQuantizer",
    "ProductQuantizer",
    "ProjectedQuantizer",
    "Quantized",
    "ResidualQuantizer",
    "SharedIndexQuantizer",
    "SignQuantizer",
    "SoftMultiScaleQuantizer",
    "VectorQuantizer",
    "convert",
    "disentangle_loss",
    "fold",
    "pack_bits",
    "perturb_codes",
    "unfold",
    "unpack_bits",
]
