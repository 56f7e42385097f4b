"""What the losses ask of their arguments: sentences with loss, argument, wanted, got."""

from __future__ import annotations

from torch import Tensor


def images(where: str, name: str, value: Tensor) -> None:
    """`value` is a floating [B, 3, H, W].

    Raises:
        TypeError: no tensor of floats.
        ValueError: another shape.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{where}: {name}: wanted a tensor of floats, got {got}")
    if value.dim() != 4 or value.shape[1] != 3:
        raise ValueError(f"{where}: {name}: wanted [B, 3, H, W], got {list(value.shape)}")


def alike(where: str, name: str, value: Tensor, other: Tensor) -> None:
    """`value` has the shape of `other`.

    Raises:
        ValueError: another shape.
    """
    if value.shape != other.shape:
        raise ValueError(f"{where}: {name}: wanted {list(other.shape)}, got {list(value.shape)}")


def at_least(where: str, name: str, value: float, low: float) -> None:
    """`value` is a number from `low` on; NaN is none.

    Raises:
        ValueError: below `low`.
    """
    if not value >= low:
        raise ValueError(f"{where}: {name}: wanted a number >= {low}, got {value}")


def one_of(where: str, name: str, value: object, choices: tuple) -> None:
    """`value` is one of `choices`.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{where}: {name}: wanted one of {', '.join(map(str, choices))}, got {value!r}")


def mean(values: Tensor) -> Tensor:
    """The mean, and 0 with a gradient of zeros where there is nothing: a rank without pictures must not send NaN to the others."""
    return values.sum() / max(values.numel(), 1)
