"""How the codebooks are used: hits of every code, by scale or by codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenflow.evaluation.measure import Measure, Seen
from tokenflow.evaluation.reconstruction import used
from tokenflow.models import Tokenizer
from tokenflow.models.multiscale import MultiScaleTokenizer


def part_names(model: Tokenizer, parts: list[Tensor]) -> list[str]:
    """What each part of `model.split` is called: "scale 4 x 4", or "codebook 2"."""
    if isinstance(model, MultiScaleTokenizer):
        return [f"scale {part.shape[-2]} x {part.shape[-1]}" for part in parts]
    return [f"codebook {number + 1}" for number in range(len(parts))]


class UsageMeter:
    """Share of the ids that were hit and perplexity exp(H) of the hits.

    Scales share one codebook, so their hits are also added up. Codebooks of a group each have ids of their own: their
    measures are averaged.

    Attributes:
        hits: part -> [K].
    """

    name = "codebook use"

    def __init__(self, model: Tokenizer) -> None:
        self.model, self.codes = model, model.config.codebook_size
        self.shared = isinstance(model, MultiScaleTokenizer)
        self.hits: dict[str, Tensor] = {}

    def update(self, seen: Seen) -> None:
        parts = self.model.split(seen.indices)
        for name, part in zip(part_names(self.model, parts), parts, strict=True):
            counted = torch.bincount(part.flatten().cpu(), minlength=self.codes)
            self.hits[name] = self.hits.get(name, 0) + counted

    def measures(self) -> list[Measure]:
        by_part = {name: used(hits) for name, hits in self.hits.items()}
        if self.shared:
            total = sum(self.hits.values())
            share, perplexity = used(total)
            what = f"all scales, {self.codes} ids, {int(total.sum())} tokens"
        else:
            share, perplexity = (sum(values) / len(by_part) for values in zip(*by_part.values(), strict=True))
            what = f"mean of {len(by_part)} codebooks of {self.codes} ids"
        found = [
            Measure("codebook use", share, what, "%", 1),
            Measure("perplexity", perplexity, what, digits=1),
        ]
        for name, (share, perplexity) in by_part.items():
            tokens = int(self.hits[name].sum())
            what = f"{tokens} tokens hit {100 * share:.1f} % of {self.codes} ids"
            found.append(Measure(f"perplexity, {name}", perplexity, what, digits=1))
        return found
