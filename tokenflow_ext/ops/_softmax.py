"""What entropy_loss and soft_quantize share: who is left out, and the best codes; kernels in csrc/cpu/softmax.h."""

import torch

from tokenflow_ext.ops._native import runs_on, warn_non_finite
from tokenflow_ext.ops.search import NEAREST_CODE


def left_out(*parts: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The parts [..., D_t] of each row with zeros where any of it is not finite, and which rows [...] are finite."""
    good = parts[0].isfinite().all(-1)
    for part in parts[1:]:
        good = good & part.isfinite().all(-1)
    return [torch.where(good.unsqueeze(-1), part, 0.0) for part in parts], good


# Methods, not ~ and []: those ask for the device even where tensors are fake.
def best_codes(op: str, x: torch.Tensor, codebook: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """Ids [N, G] of the highest products of x [N, G, C] with the codebook [G, K, C]; -1 where `good` [N, G] is False."""
    left = good.logical_not().sum()
    _, where = runs_on(x)
    if len(where) == 1:
        warn_non_finite(op, int(left))
    else:
        where[2].select(0, 1).add_(left)
    (ids,) = NEAREST_CODE(x, codebook, "dot")
    return torch.where(good, ids, -1)
