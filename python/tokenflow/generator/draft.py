"""A draft of the whole picture from its caption: kernel ridge regression in closed form, with its own doubt.

A caption is the set w of its known words plus its base name b. With n = |w & w'| and [b = b'] in {0, 1}, two captions compare by

    k(w, w') = n + [b = b'] + n (n - 1) / 2

which is the inner product of the 0/1 features "holds word i", "has base b" and "holds the words i and j": ridge regression in all
words, bases and pairs of words, solved in its dual. With A = K + lambda I over the training captions and Y their centred maps,

    draft(w) = mean + k_w A^-1 Y            doubt(w) = 1 - k_w A^-1 k_w / k(w, w)

The doubt is the share of a caption's variance that the training captions leave open: near 0 for one that was seen, 1 for one that
shares no word with them. Left out of its own fit, training caption i has the draft mean + y_i - (A^-1 Y)_i / (A^-1)_ii and the
doubt (1 / (A^-1)_ii - lambda) / k_ii; both are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Above this many pictures a part, evenly spread, is fitted: A is dense and its inverse cubic.
LARGEST = 4096
EMPTY = -1


def kernel(words: Tensor, bases: Tensor, other_words: Tensor, other_bases: Tensor, count: int) -> Tensor:
    """k between two sets of captions: float64 [n, m].

    Args:
        words: positions of the words, padded with -1, int64 [n, W].
        bases: position of the base, -1 if none, int64 [n].
        other_words, other_bases: the same for the second set, [m, W'] and [m].
        count: number of words in the vocabulary.
    """
    common = _bag(words, count) @ _bag(other_words, count).T
    same = (bases[:, None] == other_bases[None]) & (bases != EMPTY)[:, None]
    return (common + same + common * (common - 1) / 2).double()


def _bag(words: Tensor, count: int) -> Tensor:
    bag = torch.zeros(len(words), count + 1)
    bag.scatter_(1, words % (count + 1), 1.0)
    return bag[:, :count]


def pad_sets(sets: Sequence[Sequence[int]]) -> Tensor:
    """Lists of positions as int64 [n, longest], padded with -1."""
    out = torch.full((len(sets), max([1, *map(len, sets)])), EMPTY, dtype=torch.int64)
    for row, values in zip(out, sets, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.int64)
    return out


class Draft(nn.Module):
    """The fitted regression. Maps are kept in the basis of their first R principal components.

    Args:
        count: words in the vocabulary.
        fitted: N, training captions. width: W, most words of one of them. rank: R. shape: (C, H, W) of a map.
    """

    def __init__(self, count: int, *, fitted: int, width: int, rank: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.count, self.shape = count, tuple(shape)
        size = shape[0] * shape[1] * shape[2]
        self.register_buffer("words", torch.full((fitted, width), EMPTY, dtype=torch.int64))
        self.register_buffer("bases", torch.full((fitted,), EMPTY, dtype=torch.int64))
        self.register_buffer("ridge", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("weights", torch.zeros(fitted, rank))
        self.register_buffer("basis", torch.zeros(rank, size))
        self._inverse: Tensor | None = None

    @classmethod
    def fit(
        cls,
        words: Sequence[Sequence[int]],
        bases: Sequence[int],
        maps: Tensor,
        *,
        count: int,
        rank: int,
        strength: float,
    ) -> tuple[Draft, Tensor, Tensor]:
        """Fit to the training captions and say what each would get if it were left out.

        Args:
            words, bases: the captions as `Vocabulary.sets` gives them, N each.
            maps: what to predict, [N, C, H, W].
            count: words in the vocabulary.
            rank: principal components that are kept, at most N - 1.
            strength: lambda over the mean of k(w, w).

        Returns:
            The draft; the coordinates [N, R] of the left-out drafts, see `maps`; the left-out doubts [N].
            Beyond 4096 pictures the others count as left out.
        """
        total = len(maps)
        chosen = torch.arange(total) if total <= LARGEST else torch.linspace(0, total - 1, LARGEST).long()
        words, bases = pad_sets(words), torch.tensor(bases, dtype=torch.int64)
        targets = maps[chosen].flatten(1).float()
        mean = targets.mean(0)
        targets = targets - mean
        rank = max(1, min(rank, len(chosen) - 1, targets.shape[1]))
        basis = principal(targets, rank)
        self = cls(count, fitted=len(chosen), width=words.shape[1], rank=rank, shape=tuple(maps.shape[1:]))
        self.words.copy_(words[chosen])
        self.bases.copy_(bases[chosen])
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        gram = self.kernel(self.words, self.bases)
        self.ridge.copy_(strength * gram.diagonal().mean().clamp(min=1e-9))
        inverse = self.inverse()
        coordinates = (targets @ basis.T).double()
        weights = inverse @ coordinates
        self.weights.copy_(weights)
        spread = inverse.diagonal()
        left_out = (coordinates - weights / spread[:, None]).float()
        doubt = ((1 / spread - self.ridge) / gram.diagonal().clamp(min=1e-9)).clamp(0, 1).float()
        if total == len(chosen):
            return self, left_out, doubt
        every, every_doubt = self.coordinates(words, bases)
        every[chosen], every_doubt[chosen] = left_out, doubt
        return self, every, every_doubt

    def kernel(self, words: Tensor, bases: Tensor) -> Tensor:
        """k between given captions [n, W], [n] and the fitted ones: float64 [n, N]."""
        return kernel(words, bases, self.words, self.bases, self.count)

    def inverse(self) -> Tensor:
        """A^-1, float64 [N, N]: made at the first use, not stored in the checkpoint."""
        if self._inverse is None:
            gram = self.kernel(self.words, self.bases)
            gram.diagonal().add_(self.ridge)
            self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        return self._inverse

    def coordinates(self, words: Tensor, bases: Tensor) -> tuple[Tensor, Tensor]:
        """Principal coordinates [n, R] of the drafts of captions [n, W], [n], and their doubts [n]."""
        near = self.kernel(words, bases)
        own = words.ne(EMPTY).sum(1).double()
        own = own + bases.ne(EMPTY) + own * (own - 1) / 2
        explained = ((near @ self.inverse()) * near).sum(1)
        doubt = torch.where(own > 0, 1 - explained / own.clamp(min=1), 1.0)
        return (near @ self.weights.double()).float(), doubt.clamp(0, 1).float()

    def maps(self, coordinates: Tensor) -> Tensor:
        """Coordinates [n, R] -> maps [n, C, H, W]."""
        return torch.addmm(self.mean, coordinates, self.basis).unflatten(1, self.shape)

    def fitted(self, words: Sequence[Sequence[int]], bases: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Coordinates [n, R] and doubts [n] of captions as `Vocabulary.sets` gives them."""
        return self.coordinates(pad_sets(words), torch.tensor(bases, dtype=torch.int64))

    def forward(self, words: Sequence[Sequence[int]], bases: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Drafts [n, C, H, W] and doubts [n] of captions as `Vocabulary.sets` gives them."""
        coordinates, doubt = self.coordinates(pad_sets(words), torch.tensor(bases, dtype=torch.int64))
        return self.maps(coordinates), doubt

    def null(self, count: int) -> tuple[Tensor, Tensor]:
        """The draft of the null caption, `count` times: the mean map, in full doubt."""
        return self.mean.expand(count, -1).unflatten(1, self.shape), torch.ones(count)


def principal(rows: Tensor, rank: int) -> Tensor:
    """First principal directions of centred rows [N, P]: [R, P], orthonormal.

    Found from the smaller of the two Gram matrices, in which one side of the picture set is always small.
    """
    if rows.shape[0] < rows.shape[1]:
        _, vectors = torch.linalg.eigh((rows @ rows.T).double())
        directions = vectors[:, -rank:].T.float() @ rows
        return torch.linalg.qr(directions.T).Q.T.contiguous()
    _, vectors = torch.linalg.eigh((rows.T @ rows).double())
    return vectors[:, -rank:].T.float().contiguous()
