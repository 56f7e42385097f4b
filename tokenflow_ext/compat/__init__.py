"""The originals' quantizers, one import to swap: same constructors, methods, returns and state-dict names, native kernels.

    from tokenflow_ext.compat.tokenflow import VectorQuantizer
    from tokenflow_ext.compat.unitok import VectorQuantizerM
    from tokenflow_ext.compat.var import VectorQuantizer2
    from tokenflow_ext.compat.vq import VectorQuantize

`tokenflow_ext.quantize.convert(model)` swaps them inside a model that exists. `quirks=True` counts usage as the originals do,
traps included; by default a clean counter stands in the same buffer: it moves in training only, needs no process group, sums
over ranks where there is one, and goes on after a resume.
"""

from tokenflow_ext.compat import tokenflow, unitok, var, vq

__all__ = ["tokenflow", "unitok", "var", "vq"]
