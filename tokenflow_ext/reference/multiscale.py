"""Twins of the multi-scale ops: residual quantization over a list of grids, in plain PyTorch.

With Down = area resampling, Up = bicubic resampling, phi_s an optional 3x3 refinement and q_s the codes of
scale s, the loop is r_1 = x, r_{s+1} = r_s - sg(phi_s(Up q_s)), where q_s are the codes nearest to Down r_s.
Maps are channels last inside, [B, H, W, C]; the tables of a shared index lie side by side in C.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow_ext._scales import grids, pair
from tokenflow_ext._types import Quantized
from tokenflow_ext.reference._exact import exact
from tokenflow_ext.reference.quantize import gather, real_type, search, searched
from tokenflow_ext.reference.resample import resample

Phi = tuple[Tensor, Tensor, float, Sequence[int]]
Scales = Sequence[int | tuple[int, int]]


def split_rows(rows: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """rows [B, L, ...] cut into one [B, h w, ...] for each grid, as many whole grids as L holds."""
    lengths, left = [], rows.shape[1]
    for h, w in sizes:
        if left < h * w:
            break
        lengths.append(h * w)
        left -= h * w
    return rows.split(lengths, dim=1) if lengths else ()


def _tables(codebooks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tables side by side, raw, [K, C]."""
    return torch.cat([c.to(dtype) for c in codebooks], dim=-1)


def _codes(codebooks: Sequence[Tensor], dtype: torch.dtype, metric: str, normalize_codes: bool | None) -> Tensor:
    """The rows [K, C] that maps are made of: the tables side by side, each unit where codes are normalised."""
    unit = metric == "cosine" if normalize_codes is None else normalize_codes
    tables = _tables(codebooks, dtype)
    return searched(tables, [c.shape[1] for c in codebooks], "cosine") if unit else tables


def _contribution(codes: Tensor, grid: tuple[int, int], size: tuple[int, int], phi: Phi | None, s: int) -> Tensor:
    """phi_s(Up q_s): what the codes [B, h w, C] of scale s add to the map [B, H, W, C]."""
    up = resample(codes.unflatten(1, grid), size, "bicubic")
    if phi is None:
        return up
    weight, bias, ratio, assignment = phi
    p = assignment[s]
    refined = F.conv2d(up.movedim(-1, 1), weight[p].to(up.dtype), bias[p].to(up.dtype), padding=1)
    return (1.0 - ratio) * up + ratio * refined.movedim(1, -1)


def _dropped(indices: Tensor) -> Tensor:
    """[B, 1, 1, 1]: the samples that this scale's indices [B, h w] skip."""
    return (indices == -1).all(dim=1)[:, None, None, None]


def _pooled_rows(residual: Tensor, grid: tuple[int, int]) -> Tensor:
    """Down r_s as rows [B, h w, C]; a row with any value that is not a number is NaN throughout."""
    rows = resample(residual, grid, "area").flatten(1, 2)
    return torch.where(rows.isfinite().all(dim=-1, keepdim=True), rows, torch.nan)


def _loss(code: Tensor, target: Tensor, codebook_weight: float, commitment_weight: float) -> Tensor:
    """codebook_weight mean((q - sg y)^2) + commitment_weight mean((sg q - y)^2); rows with NaN count as zero."""
    finite = (code - target).detach().isfinite().all(dim=-1, keepdim=True)
    to_code = torch.where(finite, code - target.detach(), 0.0)
    to_target = torch.where(finite, code.detach() - target, 0.0)
    total = codebook_weight * to_code.square().sum() + commitment_weight * to_target.square().sum()
    return total / max(code.numel(), 1)


def _straight_through(value: Tensor, source: Tensor) -> Tensor:
    """The value, bit for bit, with the gradient of the source; NaN entries send none."""
    passed = value.detach() + (source - source.detach())
    return torch.where(value.detach().isnan(), torch.nan, passed)


@exact
def multiscale_quantize(
    features: Tensor,
    codebooks: Sequence[Tensor],
    *,
    scales: Scales,
    metric: str = "cosine",
    weights: Sequence[float] | None = None,
    phi: Phi | None = None,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    loss_on: str = "codes",
    normalize_codes: bool | None = None,
) -> Quantized:
    """Twin of `tokenflow_ext.ops.multiscale_quantize`, which documents arguments and result."""
    dims = [c.shape[1] for c in codebooks]
    size = tuple(features.shape[2:])
    x = features.to(real_type(features, *codebooks)).movedim(1, -1)
    tables, codes = _tables(codebooks, x.dtype).detach(), _codes(codebooks, x.dtype, metric, normalize_codes)
    weights = [1.0] * len(dims) if weights is None else weights
    residual = x.detach() if loss_on == "accumulated" else x
    accumulated = torch.zeros_like(x)
    loss, indices = x.new_zeros(()), []
    for s, grid in enumerate(grids("multiscale_quantize", scales)):
        rows = _pooled_rows(residual, grid)
        finite = rows.isfinite().all(dim=-1, keepdim=True)
        index = search(rows.detach().flatten(0, 1)[:, None], tables[None], dims, weights, metric).view(rows.shape[:2])
        code = torch.where(finite, gather(index, codes), torch.nan)
        indices.append(index)
        if loss_on == "codes":
            rows = torch.where(finite, rows, 0.0)
            y = searched(rows, dims, metric)
            loss = loss + _loss(code, y, codebook_weight, commitment_weight)
            code = _straight_through(code, y)
        step = _contribution(code, grid, size, phi, s)
        accumulated = accumulated + step
        residual = residual - step.detach()
        if loss_on == "accumulated":
            loss = loss + _loss(accumulated, x, codebook_weight, commitment_weight)
    quantized = _straight_through(accumulated, accumulated if loss_on == "codes" else x)
    return Quantized(quantized.movedim(-1, 1).to(features.dtype), torch.cat(indices, dim=1), loss / len(scales))


@exact
def multiscale_rows(
    features: Tensor,
    indices: Tensor,
    codebooks: Sequence[Tensor],
    *,
    scales: Scales,
    metric: str = "cosine",
    weights: Sequence[float] | None = None,
    phi: Phi | None = None,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    loss_on: str = "codes",
    normalize_codes: bool | None = None,
) -> Tensor:
    """Twin of `tokenflow_ext.ops.multiscale_rows`, which documents arguments and result."""
    sizes = grids("multiscale_rows", scales)
    residual = features.to(real_type(features, *codebooks)).movedim(1, -1)
    size = tuple(features.shape[2:])
    pieces = []
    with torch.no_grad():
        table = _codes(codebooks, residual.dtype, metric, normalize_codes)
    for s, (grid, index) in enumerate(zip(sizes, split_rows(indices, sizes))):
        dropped = _dropped(index)
        rows = _pooled_rows(residual, grid)
        pieces.append(torch.where(dropped[..., 0], 0.0, rows))
        code = torch.where(rows.detach().isfinite().all(dim=-1, keepdim=True), gather(index, table), torch.nan)
        with torch.no_grad():
            step = _contribution(code, grid, size, phi, s)
        residual = residual - torch.where(dropped, 0.0, step)
    return torch.cat(pieces, dim=1) if pieces else residual.new_zeros(len(residual), 0, residual.shape[-1])


def _running_maps(
    indices: Tensor, table: Tensor, sizes: Sequence[tuple[int, int]], size: tuple[int, int], phi: Phi | None
) -> list[Tensor]:
    """Accumulated maps [B, H, W, C] after 0, 1, ... scales of the prefix."""
    maps = [table.new_zeros(len(indices), *size, table.shape[1])]
    for s, (grid, index) in enumerate(zip(sizes, split_rows(indices, sizes))):
        dropped = _dropped(index)
        codes = gather(torch.where(dropped[..., 0, 0], 0, index), table)
        maps.append(maps[-1] + torch.where(dropped, 0.0, _contribution(codes, grid, size, phi, s)))
    return maps


@exact
def multiscale_decode(
    indices: Tensor,
    codebooks: Sequence[Tensor],
    *,
    scales: Scales,
    size: int | tuple[int, int],
    metric: str = "cosine",
    phi: Phi | None = None,
    normalize_codes: bool | None = None,
) -> Tensor:
    """Twin of `tokenflow_ext.ops.multiscale_decode`, which documents arguments and result."""
    table = _codes(codebooks, real_type(*codebooks), metric, normalize_codes)
    maps = _running_maps(
        indices, table, grids("multiscale_decode", scales), pair("multiscale_decode", "size", size), phi
    )
    return maps[-1].movedim(-1, 1).contiguous()


def _chain_states(
    indices: Tensor, table: Tensor, sizes: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """inputs[i] = bicubic(states[i - 1] -> grid i), states[i] = inputs[i] + codes of scale i (none if dropped)."""
    inputs, states = [], []
    pieces = split_rows(indices, sizes)
    for i, grid in enumerate(sizes[: len(pieces) + 1]):
        empty = table.new_zeros(len(indices), *grid, table.shape[1])
        inputs.append(resample(states[-1], grid, "bicubic") if states else empty)
        if i < len(pieces):
            dropped = _dropped(pieces[i])
            codes = gather(torch.where(dropped[..., 0, 0], 0, pieces[i]), table).unflatten(1, grid)
            states.append(inputs[-1] + torch.where(dropped, 0.0, codes))
    return inputs, states


@exact
def multiscale_inputs(
    indices: Tensor,
    codebooks: Sequence[Tensor],
    *,
    scales: Scales,
    size: int | tuple[int, int],
    rule: str,
    refine: int | None = None,
    metric: str = "cosine",
    phi: Phi | None = None,
    normalize_codes: bool | None = None,
) -> Tensor:
    """Twin of `tokenflow_ext.ops.multiscale_inputs`, which documents arguments and result."""
    sizes = grids("multiscale_inputs", scales)
    table = _codes(codebooks, real_type(*codebooks), metric, normalize_codes)
    if rule == "chain":
        inputs, states = _chain_states(indices, table, sizes)
        if refine is not None:
            inputs[refine - 1] = states[refine - 1]
        inputs = inputs[1:]
    else:
        maps = _running_maps(indices, table, sizes, pair("multiscale_inputs", "size", size), phi)
        inputs = [resample(m, grid, "area") for m, grid in zip(maps[1:], sizes[1:])]
    rows = [i.flatten(1, 2) for i in inputs]
    return torch.cat(rows, dim=1) if rows else table.new_zeros(len(indices), 0, table.shape[1])
