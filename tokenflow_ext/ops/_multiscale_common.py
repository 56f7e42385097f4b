"""What the registrations of the multi-scale operators share.

Grids travel as a flat list (h, w, row of phi) a scale; several tables as one codebook [K, C] split by widths; phi as
weight [P, C, C, 3, 3] and bias [P, C], or None twice.
"""

from functools import lru_cache

import torch


def cells_of(grids) -> list[int]:
    """h w of every scale."""
    return [h * w for h, w in zip(grids[::3], grids[1::3])]


def grid_rows(grids) -> torch.Tensor:
    """The grids as the kernels read them, int64 [S, 3]; never written."""
    return _grid_rows(tuple(grids))


@lru_cache(256)
def _grid_rows(grids) -> torch.Tensor:
    return torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)


def contiguous(*tensors):
    """Each of them row major without gaps; None stays."""
    return [None if t is None else t.contiguous() for t in tensors]


def norms_space(like, shape, unit_codes: bool):
    """code_norms [B, L, T]: written by the kernels where codes are unit, zeros elsewhere."""
    return (like.new_empty if unit_codes else like.new_zeros)(shape)


def refuse_outside(op: str, outside: int, codes: int) -> None:
    """ValueError where a kernel counted ids that are neither in the table nor part of a dropped scale."""
    if outside:
        raise ValueError(f"{op}: indices: wanted ids in [0, {codes}), or -1 for a whole scale, got {outside} others")
