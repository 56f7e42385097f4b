"""The linear probe of a data set in class folders, as a meter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.data.entries import Entry
from tokenflow.data.folder import bases_of
from tokenflow.data.pictures import split_by_base, stable_order
from tokenflow.evaluation.measure import Measure, Seen
from tokenflow.evaluation.probe import STRENGTH, balanced_probe, probe_classes
from tokenflow.models import TokenFlow, Tokenizer, UniTok

GRID = 8


def kinds_of(model: Tokenizer, seen: Seen) -> dict[str, Tensor]:
    """What is probed: the model's features of each picture [n, D] by name, and its pixels for comparison."""
    codes, name = seen.codes.float(), "codes"
    if isinstance(model, TokenFlow):
        codes, name = codes[:, : model.config.semantic_dim], "semantic half"
    grid = lambda t: F.adaptive_avg_pool2d(t, GRID).flatten(1).cpu()  # noqa: E731
    found = {f"{name}, {GRID} x {GRID}": grid(codes), f"{name}, mean": codes.mean((2, 3)).cpu()}
    if isinstance(model, UniTok):
        found["image vector"] = model.image_vectors(seen.codes).float().cpu()
    return {**found, f"pixels, {GRID} x {GRID}": grid(seen.originals)}


class ProbeMeter:
    """Balanced accuracy of a linear classifier on the features of pictures that it was not fitted on.

    About a ninth of the names in each class is held out, see `split_by_base`; of a large data set, the first `most` pictures
    in the order of a hash of their names take part.

    Args:
        model: whose features.
        entries: the data set.
        most: pictures at most.
    """

    name = "linear probe"

    def __init__(self, model: Tokenizer, entries: Sequence[Entry], *, most: int) -> None:
        self.model = model
        chosen = set(stable_order([entry.key for entry in entries])[:most])
        kept = [row for row, entry in enumerate(entries) if entry.key in chosen]
        groups = [entries[row].group for row in kept]
        split = split_by_base(bases_of([entries[row] for row in kept]), groups)
        self.about = {row: about for row, *about in zip(kept, groups, split, strict=True)}
        self.rows: list[int] = []
        self.found: list[dict[str, Tensor]] = []

    @property
    def possible(self) -> bool:
        """Whether two classes have pictures on both sides."""
        sides = [[group for group, side in self.about.values() if side == name] for name in ("train", "test")]
        return len(probe_classes(*sides)) > 1

    def update(self, seen: Seen) -> None:
        places = [place for place, row in enumerate(seen.rows) if row in self.about]
        if places:
            self.rows += [seen.rows[place] for place in places]
            part = seen._replace(originals=seen.originals[places], codes=seen.codes[places])
            self.found.append(kinds_of(self.model, part))

    def measures(self) -> list[Measure]:
        if not self.rows:
            return []
        groups, split = zip(*(self.about[row] for row in self.rows), strict=True)
        classes = probe_classes(*([g for g, side in zip(groups, split) if side == name] for name in ("train", "test")))
        taken = [(i, side) for i, (group, side) in enumerate(zip(groups, split)) if group in classes]
        train, test = ([i for i, side in taken if side == name] for name in ("train", "test"))
        found = []
        for name in self.found[0]:
            x = torch.cat([part[name] for part in self.found])
            probe = balanced_probe(x[train], [groups[i] for i in train], x[test], [groups[i] for i in test])
            if probe is not None:
                protocol = (
                    f"balanced accuracy of {probe.classes} classes (chance {1 / probe.classes:.3f}), logistic regression with "
                    f"weight {STRENGTH:g} fitted on {len(train)} of the pictures, tested on {len(test)} of other names"
                )
                found.append(Measure(f"linear probe, {name}", probe.balanced, protocol, digits=3))
        return found
