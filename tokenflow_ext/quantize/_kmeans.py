"""k-means on a sample of the first batch, the same on every rank: k-means++ in growing batches, then Lloyd's algorithm."""

from collections.abc import Callable

import torch

from tokenflow_ext import ops
from tokenflow_ext.quantize import _ranks

SAMPLE = 32768
"""Rows that k-means looks at, over all ranks; twice the codes where that is more."""
LLOYD = 10
BATCH = 8
"""k-means++ draws one code at a time, then as many at once as an eighth of those that it has."""


def sample(rows: torch.Tensor, good: torch.Tensor, codes: int) -> torch.Tensor:
    """Up to max(SAMPLE, 2 codes) of the good rows of all ranks, [S, G, C], spread evenly over their numbers.

    Args:
        rows: [N, G, C] of this rank.
        good: [N].
        codes: K.
    """
    _, groups, width = rows.shape
    first, total = _ranks.numbering(good.sum().view(1))
    size = min(int(total), max(SAMPLE, 2 * codes))
    numbers = torch.arange(size, device=rows.device)[None]
    numbers, _ = _ranks.spread(numbers, torch.full_like(total, size), total, torch.zeros_like(total))
    flat = rows.reshape(rows.shape[0], 1, groups * width)
    return _ranks.rows_at(flat, good[:, None], first, numbers).view(size, groups, width)


def kmeans(
    rows: torch.Tensor, codes: int, weights: torch.Tensor, search: Callable, unit: Callable, backend: str
) -> torch.Tensor:
    """Codes [G, K, C] for rows [S, G, C], S >= 1, by k-means++ and LLOYD steps.

    A code without rows takes one that lies far from its code, drawn like those of k-means++. Where there are fewer distinct rows
    than codes, the codes left over are rows with noise of a tenth of the rows' standard deviation.

    Args:
        rows: as searched.
        codes: K.
        weights: [C], of the squared differences.
        search: (rows [S, G, C], codes [G, M, C]) -> ids [S, G].
        unit: makes codes as long as they have to be.
        backend: of the ops.

    Source: Arthur and Vassilvitskii 2007, k-means++; many codes a round as in Bahmani et al., 1203.6402.
    """
    rows = rows.repeat(-(-codes // len(rows)), 1, 1)
    by_group = rows.transpose(0, 1)
    noise = torch.arange(rows[..., 0].numel(), device=rows.device).view(rows.shape[:2])

    def far(distances: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        """Places [count, G] of different rows, drawn with probability ~ distance; those at distance 0 come last."""
        draw = (_ranks.mixed((noise + seed * 0x9E3779B1) & 0xFFFFFFFF).double() + 0.5) / 2**32
        return (draw.log() / distances.double()).topk(count, dim=0).indices

    def take(places: torch.Tensor) -> torch.Tensor:
        return by_group.gather(1, places.t()[..., None].expand(-1, -1, rows.shape[-1]))

    def distances(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        near = table.gather(1, ids.t()[..., None].expand(-1, -1, rows.shape[-1])).transpose(0, 1)
        return ((rows - near).square() * weights).sum(-1)

    table = take(far(torch.ones_like(rows[..., 0]), 1, 0))
    nearest = distances(table, torch.zeros_like(noise))
    while table.shape[1] < codes:
        held = table.shape[1]
        fresh = take(far(nearest, min(codes - held, max(1, held // BATCH)), held))
        nearest = torch.minimum(nearest, distances(fresh, search(rows, fresh)))
        table = torch.cat([table, fresh], dim=1)
    for step in range(LLOYD):
        ids = search(rows, table)
        counts, sums = ops.code_statistics(rows, ids, (rows.shape[1], codes), backend=backend)
        empty = counts == 0
        if step < LLOYD - 1:
            left = distances(table, ids)
            places = far(left, codes, codes + step).t().gather(1, (empty.cumsum(1) - 1).clamp_min(0))
            useful = empty & (left.t().gather(1, places) > 0)
            table = torch.where(useful[..., None], take(places.t()), table)
        table = torch.where(empty[..., None], table, unit(sums / counts.clamp_min(1)[..., None]))
    seed = torch.arange(table.numel(), device=rows.device).view(table.shape)
    shake = _ranks.mixed(seed).to(table.dtype) / 2**31 - 1
    deviation = rows.std(0, unbiased=False)[:, None]
    return torch.where(empty[..., None], unit(table + 0.1 * deviation * shake), table)
