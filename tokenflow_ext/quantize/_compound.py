"""What modules made of several quantizers have in common."""

import torch
from torch import nn


class Compound(nn.Module):
    """Several quantizers behind the methods of one."""

    def __init__(self, quantizers):
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)

    def codebooks(self) -> tuple[torch.Tensor, ...]:
        """The tables of all quantizers, one after another."""
        return tuple(table for quantizer in self.quantizers for table in quantizer.codebooks())

    def usage(self) -> float:
        """Share of codes hit since `reset_usage()`, in training only; mean over the quantizers."""
        return sum(quantizer.usage() for quantizer in self.quantizers) / len(self.quantizers)

    def perplexity(self) -> float:
        """exp of the entropy of those hits, mean over the quantizers."""
        return sum(quantizer.perplexity() for quantizer in self.quantizers) / len(self.quantizers)

    def reset_usage(self) -> None:
        """Starts counting anew."""
        for quantizer in self.quantizers:
            quantizer.reset_usage()

    def freeze(self) -> None:
        """Codebooks move no more, by no rule."""
        for quantizer in self.quantizers:
            quantizer.freeze()
