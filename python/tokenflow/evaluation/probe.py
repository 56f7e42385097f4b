"""A linear probe: how much of a picture's class can be read off its features by a straight line.

Balanced accuracy = mean over the classes of the share of that class's test pictures that is right, so that a class with half
of the pictures counts as much as any other; chance is 1 / classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """balanced: accuracy in [0, 1]; classes: their number; smallest: fewest test pictures in one class."""

    balanced: float
    classes: int
    smallest: int


def probe_classes(train_groups: Sequence[str], test_groups: Sequence[str]) -> list[str]:
    """The classes that can be probed: named, with training and test pictures."""
    return sorted((set(train_groups) & set(test_groups)) - {""})


def balanced_probe(train: Tensor, train_groups: Sequence[str], test: Tensor, test_groups: Sequence[str], *,
                   l2: float = 1e-3) -> Probe | None:
    """Class-balanced logistic regression on standardised features; None with fewer than two classes.

    Args:
        train: [n, D] training features.
        train_groups: class of each.
        test: [m, D] features of pictures of other base names.
        test_groups: class of each.
        l2: weight of the squared norm of the coefficients.
    """
    classes = probe_classes(train_groups, test_groups)
    if len(classes) < 2:
        return None
    number = {name: i for i, name in enumerate(classes)}
    kept = [i for i, g in enumerate(train_groups) if g in number]
    kept_test = [i for i, g in enumerate(test_groups) if g in number]
    y = torch.tensor([number[train_groups[i]] for i in kept])
    y_test = torch.tensor([number[test_groups[i]] for i in kept_test])
    train, test = train[kept].float(), test[kept_test].float()
    mean, deviation = train.mean(0), train.std(0) + 1e-4
    train, test = (train - mean) / deviation, (test - mean) / deviation
    counts = torch.bincount(y, minlength=len(classes)).float()
    share = (len(y) / len(classes) / counts)[y]
    weight = torch.zeros(train.shape[1], len(classes), requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (F.cross_entropy(train @ weight + bias, y, reduction="none") * share).mean() + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        right = ((test @ weight + bias).argmax(1) == y_test).float()
    per_class = torch.stack([right[y_test == c].mean() for c in range(len(classes))])
    return Probe(float(per_class.mean()), len(classes), int(torch.bincount(y_test).min()))
