"""Classes and captions against pictures, for a tokenizer with a text tower: zero-shot accuracy and retrieval.

    class of x = argmax_c cos(v(x), t_c),   t_c = mean over the templates of unit text vectors

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.data.entries import Entry
from tokenflow.data.pictures import stable_order
from tokenflow.evaluation.measure import Measure, Seen
from tokenflow.evaluation.retrieval import Ranks, ranks_of_diagonal
from tokenflow.models import UniTok

TEMPLATES = ("a photo of a {}.",)
CANDIDATES = 5000


@torch.no_grad()
def text_vectors(
    model: UniTok, words: Callable[[Sequence[str]], Tensor], texts: Sequence[str], *, batch: int = 64
) -> Tensor:
    """Unit vectors [n, E] of texts; `words` makes ids of them."""
    device = next(model.parameters()).device
    chunks = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    return torch.cat([model.encode_text(words(chunk).to(device), normalize=True).float().cpu() for chunk in chunks])


def class_vectors(
    model: UniTok, words: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Unit vectors [C, E] of class names in templates with one {} each.

    Raises:
        ValueError: a template without {}.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"class_vectors: templates: wanted {{}} for the class in each, got {template!r}")
    texts = [template.replace("{}", name) for name in names for template in templates]
    return F.normalize(text_vectors(model, words, texts).view(len(names), len(templates), -1).mean(1), dim=1)


class WordsMeter:
    """Zero-shot accuracy where there are classes, retrieval where captions came with the pictures.

    Args:
        model: with a text tower.
        words: captions -> token ids, see `tokenflow.models.text.TextTokenizer`.
        entries: the data set.
        names: class -> its words; a class that is not there is called by its folder's name.
        templates: sentences with one {}.
    """

    name = "zero-shot and retrieval"

    def __init__(
        self,
        model: UniTok,
        words: Callable[[Sequence[str]], Tensor],
        entries: Sequence[Entry],
        names: dict[str, str],
        templates: Sequence[str] = TEMPLATES,
    ) -> None:
        self.model, self.words, self.entries, self.templates = model, words, entries, templates
        self.classes = sorted({entry.group for entry in entries} - {""})
        self.names = [names.get(c) or c.replace("_", " ") for c in self.classes]
        self.rows: list[int] = []
        self.vectors: list[Tensor] = []

    def update(self, seen: Seen) -> None:
        self.rows += seen.rows
        self.vectors.append(self.model.image_vectors(seen.codes, normalize=True).float().cpu())

    def measures(self) -> list[Measure]:
        vectors = torch.cat(self.vectors)
        return [*self._zero_shot(vectors), *self._retrieval(vectors)]

    def _zero_shot(self, vectors: Tensor) -> list[Measure]:
        number = {name: i for i, name in enumerate(self.classes)}
        places = [i for i, row in enumerate(self.rows) if self.entries[row].group]
        if len(self.classes) < 2 or not places:
            return []
        truth = torch.tensor([number[self.entries[self.rows[i]].group] for i in places])
        scores = vectors[places] @ class_vectors(self.model, self.words, self.names, self.templates).T
        top = scores.topk(min(5, len(self.classes)), dim=1).indices == truth[:, None]
        first = top[:, 0].double()
        balanced = torch.stack([first[truth == c].mean() for c in truth.unique()]).mean()
        protocol = (
            f"{len(self.classes)} classes, {len(places)} pictures, templates {', '.join(map(repr, self.templates))}"
        )
        found = [("zero-shot accuracy", first.mean()), ("zero-shot accuracy, balanced", balanced)]
        if len(self.classes) > 5:
            found.append(("zero-shot accuracy, top 5", top.any(1).double().mean()))
        return [Measure(name, float(value), protocol, "%", 1) for name, value in found]

    def _retrieval(self, vectors: Tensor) -> list[Measure]:
        first: dict[str, int] = {}
        for place, row in enumerate(self.rows):
            if self.entries[row].caption:
                first.setdefault(self.entries[row].caption, place)
        captions = stable_order(list(first))[:CANDIDATES]
        if len(captions) < 2:
            return []
        texts = text_vectors(self.model, self.words, captions)
        scores, found = vectors[[first[c] for c in captions]] @ texts.T, []
        for way, table in (("picture to caption", scores), ("caption to picture", scores.T)):
            ranks = Ranks.of(ranks_of_diagonal(table), len(captions))
            protocol = f"{len(captions)} different captions, one picture each, median rank {ranks.median:.0f}"
            found += [Measure(f"recall@{k}, {way}", value, protocol, "%", 1) for k, value in ranks.recall.items()]
        return found
