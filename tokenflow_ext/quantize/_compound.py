"""What modules made of several quantizers have in common."""

import torch
from torch import nn

from tokenflow_ext.quantize import _usage


class Compound(nn.Module):
    """Several quantizers behind the methods of one."""

    def __init__(self, quantizers):
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)

    def codebooks(self) -> tuple[torch.Tensor, ...]:
        """The tables of all quantizers, one after another."""
        return tuple(table for quantizer in self.quantizers for table in quantizer.codebooks())

    def usage(self, per: str | None = None, *, all_ranks: bool = True) -> float | torch.Tensor:
        """Share of codes hit since `reset_usage()`, in training only.

        Args:
            per: None for the mean over the quantizers, "quantizer" for each of them, float64 on the CPU.
            all_ranks: see `VectorQuantizer.usage`.
        """
        return self._summary([quantizer.usage(all_ranks=all_ranks) for quantizer in self.quantizers], per)

    def perplexity(self, per: str | None = None, *, all_ranks: bool = True) -> float | torch.Tensor:
        """exp of the entropy of those hits; arguments as in `usage`."""
        return self._summary([quantizer.perplexity(all_ranks=all_ranks) for quantizer in self.quantizers], per)

    def _summary(self, values: list[float], per: str | None) -> float | torch.Tensor:
        each = _usage.known_part(type(self).__name__, per, "quantizer")
        return torch.tensor(values, dtype=torch.float64) if each else sum(values) / len(values)

    def non_finite_rows(self, *, all_ranks: bool = True) -> int:
        """Rows with NaN or inf since `reset_usage()`, in training, counted by each quantizer that they spoil."""
        return sum(quantizer.non_finite_rows(all_ranks=all_ranks) for quantizer in self.quantizers)

    def reset_usage(self) -> None:
        """Starts counting anew."""
        for quantizer in self.quantizers:
            quantizer.reset_usage()

    def freeze(self) -> None:
        """Codebooks move no more, by no rule."""
        for quantizer in self.quantizers:
            quantizer.freeze()
