"""The words of the training captions: token ids for the transformer, word sets for the draft."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

PAD, NULL, UNKNOWN = 0, 1, 2
SPECIAL = 3
LONGEST = 16
# A word may hold hyphens and apostrophes ("medium-dark"); a lone sign such as # or * is a word of its own.
WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s,.:;()\"“”]")


def split_words(caption: str) -> list[str]:
    """Lower-case words of a caption, in order.

    >>> split_words("Man scientist, medium-dark skin tone")
    ['man', 'scientist', 'medium-dark', 'skin', 'tone']
    """
    return WORD.findall(caption.lower())


class Vocabulary:
    """Words and base names of the training captions.

    Ids 0, 1, 2 are padding, the null caption and an unknown word; word i has id 3 + i.

    Args:
        words: known words.
        bases: known base names (a caption without its tone), as tuples of words joined by a space.
        length: T, words of a caption that the transformer reads; the rest is cut off.

    Example:
        >>> v = Vocabulary.fit(["red apple", "apple, dark"], ["red apple", "apple"])
        >>> v.ids(["dark pear", ""]).tolist(), v.unknown("dark pear")
        ([[4, 2], [1, 0]], ['pear'])
    """

    def __init__(self, words: Sequence[str], bases: Sequence[str], length: int) -> None:
        self.words, self.bases, self.length = list(words), list(bases), length
        self._word = {w: i for i, w in enumerate(self.words)}
        self._base = {b: i for i, b in enumerate(self.bases)}

    @classmethod
    def fit(cls, captions: Sequence[str], bases: Sequence[str]) -> Vocabulary:
        """The vocabulary of the training captions [N] and their base names [N]."""
        split = [split_words(c) for c in captions]
        length = min(LONGEST, max(map(len, split), default=1))
        return cls(
            sorted({w for words in split for w in words}),
            sorted({" ".join(split_words(b)) for b in bases} - {""}),
            max(1, length),
        )

    def __len__(self) -> int:
        """Number of ids, the three special ones included."""
        return SPECIAL + len(self.words)

    def unknown(self, caption: str) -> list[str]:
        """Words of the caption that no training caption holds, in order, each once."""
        return [w for w in dict.fromkeys(split_words(caption)) if w not in self._word]

    def ids(self, captions: Sequence[str]) -> Tensor:
        """int64 [B, T]; a caption without words is the null caption."""
        out = torch.full((len(captions), self.length), PAD, dtype=torch.int64)
        for row, caption in zip(out, captions, strict=True):
            words = split_words(caption)[: self.length]
            ids = [SPECIAL + self._word[w] if w in self._word else UNKNOWN for w in words] or [NULL]
            row[: len(ids)] = torch.tensor(ids)
        return out

    def base(self, caption: str) -> int:
        """Position of the caption's base name: the longest known one that ends at a comma or at the end; -1 if none."""
        parts = caption.split(",")
        for end in range(len(parts), 0, -1):
            name = " ".join(split_words(",".join(parts[:end])))
            if name in self._base:
                return self._base[name]
        return -1

    def sets(self, captions: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Known words of each caption as a set of positions (a list each), and its base (-1 if none)."""
        words = [sorted({self._word[w] for w in split_words(c) if w in self._word}) for c in captions]
        return words, [self.base(c) for c in captions]

    def to_dict(self) -> dict:
        """What `from_dict` reads."""
        return {"words": self.words, "bases": self.bases, "length": self.length}

    @classmethod
    def from_dict(cls, values: dict) -> Vocabulary:
        """The vocabulary that `to_dict` described."""
        return cls(values["words"], values["bases"], values["length"])
