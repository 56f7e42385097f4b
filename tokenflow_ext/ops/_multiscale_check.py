"""Checks of the multi-scale ops: every sentence names op, argument, wanted, got."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenflow_ext._scales import grids, pair
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import real


@dataclass
class Setup:
    """The checked options of a call, as the operators take them. No NamedTuple: Dynamo 2.9 cannot go through its lists."""

    widths: list[int]
    weights: list[float]
    metric: str
    unit_codes: bool
    grids: list[int]  # (h, w, row of phi) a scale, flat
    size: tuple[int, int]
    phi: tuple | None
    dtype: torch.dtype

    @property
    def cells(self) -> list[int]:
        return [h * w for h, w in zip(self.grids[::3], self.grids[1::3])]

    def codebook(self, codebooks) -> torch.Tensor:
        """The tables side by side, [K, C], in the type that is computed in."""
        tables = [c.to(self.dtype) for c in codebooks]
        return torch.cat(tables, dim=-1) if len(tables) > 1 else tables[0]

    def phi_tensors(self) -> tuple:
        """(weight, bias, ratio) in the type that is computed in, (None, None, 0.0) where there is no phi."""
        if self.phi is None:
            return None, None, 0.0
        return self.phi[0].to(self.dtype), self.phi[1].to(self.dtype), float(self.phi[2])


def unit_codes(op: str, metric: str, normalize_codes: bool | None) -> bool:
    """Whether maps are made of unit codes."""
    if normalize_codes is not None and not isinstance(normalize_codes, bool):
        raise TypeError(f"{op}: normalize_codes: wanted None, True or False, got {type(normalize_codes).__name__}")
    if normalize_codes and metric != "cosine":
        raise ValueError(f"{op}: normalize_codes: wanted None or False for metric {metric!r}, got True")
    return metric == "cosine" if normalize_codes is None else normalize_codes


def _tables(op: str, codebooks) -> list[int]:
    _check.sequence(op, "codebooks", codebooks)
    for t, codebook in enumerate(codebooks):
        _check.table(op, f"codebooks[{t}]", codebook, grouped=False)
        _check.same_device(op, **{"codebooks[0]": codebooks[0], f"codebooks[{t}]": codebook})
        _check.same_codes(op, codebooks, t)
    return [c.shape[1] for c in codebooks]


def phi_rows(op: str, phi, channels: int, scales: int) -> list[int]:
    """The row of phi of every scale."""
    if phi is None:
        return [0] * scales
    if not isinstance(phi, Sequence) or len(phi) != 4:
        raise TypeError(f"{op}: phi: wanted (weight, bias, ratio, assignment), got {type(phi).__name__}")
    weight, bias, ratio, assignment = phi
    if not abs(_check.number(op, "phi ratio", ratio)) < math.inf:  # math.isfinite would break a compiled graph
        raise ValueError(f"{op}: phi ratio: wanted a finite number, got {ratio}")
    _check.floating(op, "phi weight", weight)
    _check.floating(op, "phi bias", bias)
    _check.same_device(op, **{"phi weight": weight, "phi bias": bias})
    if weight.dim() != 5 or weight.shape[0] < 1 or tuple(weight.shape[1:]) != (channels, channels, 3, 3):
        raise ValueError(f"{op}: phi weight: wanted [P, {channels}, {channels}, 3, 3], got {list(weight.shape)}")
    if tuple(bias.shape) != (weight.shape[0], channels):
        raise ValueError(f"{op}: phi bias: wanted {[weight.shape[0], channels]}, got {list(bias.shape)}")
    if not isinstance(assignment, Sequence):
        raise TypeError(f"{op}: phi assignment: wanted one row a scale, got {type(assignment).__name__}")
    rows = [_check.integer(op, "phi assignment", p) for p in assignment]
    if len(rows) != scales or not all(0 <= p < weight.shape[0] for p in rows):
        raise ValueError(f"{op}: phi assignment: wanted {scales} rows in [0, {weight.shape[0]}), got {rows}")
    return rows


def setup(op, codebooks, scales, size, metric, phi, normalize_codes, *, weights=None, features=None) -> Setup:
    """Checks of everything that the four ops have in common."""
    widths = _tables(op, codebooks)
    _check.metric(op, metric)
    unit = unit_codes(op, metric, normalize_codes)
    size = pair(op, "size", tuple(size) if isinstance(size, torch.Size) else size)
    if features is not None:
        _check.same_device(op, features=features, **{"codebooks[0]": codebooks[0]})
        if features.shape[1] != sum(widths):
            raise ValueError(
                f"{op}: features: wanted {sum(widths)} channels, as many as the tables, got {features.shape[1]}"
            )
    pairs = grids(op, scales)
    for i, (h, w) in enumerate(pairs):
        if h > size[0] or w > size[1]:
            raise ValueError(f"{op}: scales[{i}]: wanted at most the map's {size}, got {(h, w)}")
    rows = phi_rows(op, phi, sum(widths), len(pairs))
    if phi is not None:
        _check.same_device(op, **{"codebooks[0]": codebooks[0], "phi weight": phi[0]})
    flat = [n for (h, w), p in zip(pairs, rows) for n in (h, w, p)]
    wide = real(*codebooks) if features is None else real(features, *codebooks)
    return Setup(widths, _check.table_weights(op, weights, len(widths)), metric, unit, flat, size, phi, wide)


def maps(op: str, features) -> torch.Tensor:
    """`features` if it is a floating [B, C, H, W] with pixels."""
    _check.floating(op, "features", features)
    if features.dim() != 4 or min(features.shape[1:]) < 1:
        raise ValueError(f"{op}: features: wanted [B, C, H, W] with at least one pixel, got {list(features.shape)}")
    return features


def loss_on(op: str, value: str, phi) -> bool:
    """Whether the loss is on accumulated maps."""
    if value not in ("codes", "accumulated"):
        raise ValueError(f"{op}: loss_on: wanted 'codes' or 'accumulated', got {value!r}")
    if phi is not None and value != "accumulated":
        raise ValueError(f"{op}: phi: wanted loss_on='accumulated' with it, got loss_on={value!r}")
    return value == "accumulated"


def prefix(op: str, indices, made: Setup, codebooks, *, whole: bool = False) -> int:
    """How many whole scales the ids [B, L'] cover; all of them where `whole`."""
    _check.ids(op, "indices", indices)
    _check.same_device(op, indices=indices, **{"codebooks[0]": codebooks[0]})
    ends = [0]
    for cells in made.cells:
        ends.append(ends[-1] + cells)
    wanted = ends[-1:] if whole else ends
    if indices.dim() != 2 or indices.shape[1] not in wanted:
        lengths = ", ".join(map(str, wanted))
        raise ValueError(f"{op}: indices: wanted [B, L] of whole scales, L one of {lengths}, got {list(indices.shape)}")
    return ends.index(indices.shape[1])


def values_of_ids(op: str, indices, made: Setup, codes: int) -> None:
    """ValueError for ids that are neither in the table nor part of a dropped scale; read on the CPU only."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside, start = 0, 0
    for cells in made.cells:
        ids = indices[:, start : start + cells]
        start += cells
        kept = ids[~(ids == -1).all(dim=1)]
        outside += int(((kept < 0) | (kept >= codes)).sum())
    if outside:
        raise ValueError(f"{op}: indices: wanted ids in [0, {codes}), or -1 for a whole scale, got {outside} others")
