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

STRENGTH = 1e-3


@dataclass(frozen=True)
class Probe:
    """balanced: accuracy in [0, 1]; classes: their number; smallest: fewest test pictures in one class."""

    balanced: float
    classes: int
    smallest: int


def probe_classes(train_groups: Sequence[str], test_groups: Sequence[str]) -> list[str]:
    """The classes that can be probed: named, with training and test pictures."""
    return sorted((set(train_groups) & set(test_groups)) - {""})


def balanced_probe(
    train: Tensor, train_groups: Sequence[str], test: Tensor, test_groups: Sequence[str], *, strength: float = STRENGTH
) -> Probe | None:
    """Class-balanced logistic regression on standardised features; None with fewer than two classes.

    Args:
        train: [n, D] training features.
        train_groups: class of each.
        test: [m, D] features of pictures of other base names.
        test_groups: class of each.
        strength: weight of the squared norm of the coefficients.
    """
    classes = probe_classes(train_groups, test_groups)
    if len(classes) < 2:
        return None
    number = {name: i for i, name in enumerate(classes)}
    kept = [i for i, g in enumerate(train_groups) if g in number]
    kept_test = [i for i, g in enumerate(test_groups) if g in number]
    y = torch.tensor([number[train_groups[i]] for i in kept])
    y_test = torch.tensor([number[test_groups[i]] for i in kept_test])
    balanced = fitted_accuracy(train[kept].float(), y, test[kept_test].float(), y_test, len(classes), strength=strength)
    return Probe(balanced, len(classes), int(torch.bincount(y_test).min()))


def fitted_accuracy(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: int, *, strength: float) -> float:
    """Balanced accuracy on x_test [m, D], y_test [m] of the regression fitted on x [n, D], y [n]."""
    mean, deviation = x.mean(0), x.std(0) + 1e-4
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    counts = torch.bincount(y, minlength=classes).float()
    share = (1 / classes / counts)[y]
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            F.cross_entropy(x @ weight + bias, y, reduction="none") * share
        ).sum() + strength * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        right = ((x_test @ weight + bias).argmax(1) == y_test).float()
    return float(torch.stack([right[y_test == c].mean() for c in range(classes)]).mean())
