"""What the quantizers return."""

from typing import NamedTuple

import torch
import torch.utils._pytree


class Quantized(NamedTuple):
    """The three things that users of a vector quantizer unpack.

    Attributes:
        quantized: the codes, straight-through, in the shape and type of the input (a tuple, one a table, where the
            input was a tuple).
        indices: int64 ids of the codes.
        loss: 0-dim codebook + commitment loss.
    """

    quantized: torch.Tensor | tuple[torch.Tensor, ...]
    indices: torch.Tensor
    loss: torch.Tensor


# torch.export.save writes results by this name.
torch.utils._pytree._register_namedtuple(Quantized, serialized_type_name="tokenflow_ext.Quantized")
