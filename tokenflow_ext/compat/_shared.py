"""What the compatible quantizers share: tables under the originals' names, float32 throughout, and counting."""

import torch
from torch import nn

from tokenflow_ext import ops
from tokenflow_ext.quantize import _usage
from tokenflow_ext.quantize._precision import FullPrecision
from tokenflow_ext.quantize._ranks import all_reduce

WARM = 100
"""Updates after which the moving averages of usage slow down, from 0.9 to 0.99."""


class Table(FullPrecision, nn.Embedding):
    """A codebook `weight` [K, D] under the name of an nn.Embedding, looked up by the native kernel."""

    def __init__(self, codes: int, width: int, backend: str):
        super().__init__(codes, width)
        self.backend = backend

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """weight[indices], [..., D]."""
        return ops.lookup(indices.long(), self.weight, backend=self.backend)


@torch.no_grad()
def count(indices: torch.Tensor, rows: torch.Tensor, codes: int, *, ranks: bool) -> torch.Tensor:
    """How often each code was chosen, float32 [G, K]; without a one-hot, without a synchronisation.

    Args:
        indices: ids [N, G].
        rows: [N, G, D] that chose them; those that are not finite do not count.
        codes: K.
        ranks: whether to add the other ranks' counts.
    """
    hits = _usage.count(indices, rows.isfinite().all(-1), codes)
    if ranks:
        all_reduce(hits)
    return hits.float()


def rates(steps: torch.Tensor) -> torch.Tensor:
    """Weight of the new value after `steps` updates: 1 for the first, 0.1 while warm, then 0.01."""
    return torch.where(steps == 0, 1.0, torch.where(steps < WARM, 0.1, 0.01))
