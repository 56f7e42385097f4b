"""Lists of scales, read in one place for ops, twins and modules."""

from collections.abc import Sequence


def pair(op: str, name: str, value) -> tuple[int, int]:
    """(h, w) from such a pair or from an int n, which stands for (n, n)."""
    both = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(both, Sequence)
        or len(both) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) for n in both)
    ):
        raise TypeError(f"{op}: {name}: wanted an int or a pair (h, w), got {value!r}")
    if min(both) < 1:
        raise ValueError(f"{op}: {name}: wanted at least 1, got {value!r}")
    return int(both[0]), int(both[1])


def grids(op: str, scales, name: str = "scales") -> list[tuple[int, int]]:
    """Scales as pairs (h, w); `name` is what the caller's argument is called."""
    if not isinstance(scales, Sequence) or isinstance(scales, str):
        raise TypeError(f"{op}: {name}: wanted a sequence of ints or pairs (h, w), got {type(scales).__name__}")
    if len(scales) < 1:
        raise ValueError(f"{op}: {name}: wanted at least one, got none")
    return [pair(op, f"{name}[{i}]", scale) for i, scale in enumerate(scales)]
