"""Caption retrieval: a ridge regression from picture features to text vectors, ranked among pictures never trained on.

    W = argmin sum_n v_n |t_n - W^T x_n|^2 + lambda |W|^2,   score(picture, caption) = cos(W^T x, t)

v_n gives every base name the same weight. Lambda is chosen on a fifth of the training bases, then all of them are fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.data.pictures import stable_order

LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Ranks:
    """Recall and median rank of the right one among `candidates`; chance is what a random order gives."""

    recall: dict[int, float]
    median: float
    candidates: int

    @classmethod
    def of(cls, ranks: Tensor, candidates: int, *, at: Sequence[int] = (1, 5, 10)) -> Ranks:
        """From ranks [n], 1 = best."""
        return cls({k: float((ranks <= k).float().mean()) for k in at}, float(ranks.double().quantile(0.5)), candidates)

    @classmethod
    def chance(cls, candidates: int, *, at: Sequence[int] = (1, 5, 10)) -> Ranks:
        """What a random order gives."""
        return cls({k: min(1.0, k / candidates) for k in at}, (candidates + 1) / 2, candidates)


class TextRegression:
    """Ridge from features [n, D] to unit text vectors [n, T].

    Args:
        features: [n, D] of training pictures.
        vectors: [n, T] of their captions.
        bases: base name of each.
    """

    def __init__(self, features: Tensor, vectors: Tensor, bases: Sequence[str]) -> None:
        count = {base: bases.count(base) for base in set(bases)}
        share = torch.tensor([1.0 / count[base] for base in bases])
        order = stable_order(bases)
        held_out = set(order[: round(VALIDATION_SHARE * len(order))])
        validation = torch.tensor([base in held_out for base in bases])
        best = max(
            LAMBDAS,
            key=lambda ridge: self._fit(
                features[~validation], vectors[~validation], share[~validation], ridge
            )._agreement(features[validation], vectors[validation], share[validation]),
        )
        self.ridge = best
        self._fit(features, vectors, share, best)

    def _fit(self, x: Tensor, t: Tensor, share: Tensor, ridge: float) -> TextRegression:
        share = (share / share.sum())[:, None]
        self.mean, self.target_mean = (share * x).sum(0), (share * t).sum(0)
        self.deviation = (share * (x - self.mean).square()).sum(0).sqrt() + 1e-4
        x = (x - self.mean) / self.deviation
        gram = x.T @ (share * x)
        self.weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), x.T @ (share * (t - self.target_mean)))
        return self

    def _agreement(self, x: Tensor, t: Tensor, share: Tensor) -> float:
        return float(((self.scores(x, t).diagonal()) * share).sum() / share.sum())

    def scores(self, features: Tensor, vectors: Tensor) -> Tensor:
        """cos(prediction, caption), both centred on the training mean: [n, D], [m, T] -> [n, m]."""
        predicted = ((features - self.mean) / self.deviation) @ self.weight
        return F.normalize(predicted, dim=1) @ F.normalize(vectors - self.target_mean, dim=1).T


def ranks_of_diagonal(scores: Tensor) -> Tensor:
    """Rank [n] of the right column in every row of scores [n, n]; ties count against it."""
    return (scores >= scores.diagonal()[:, None]).sum(1)
