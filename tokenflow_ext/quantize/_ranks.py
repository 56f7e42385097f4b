"""What the ranks of torch.distributed do together; where there are none, the one process is all of them.

Rows are numbered over all ranks, rank 0's first, as if one process held them. A draw from these numbers by `mixed` is the same
on every rank and in one process on the whole, and only the rows that were drawn travel.
"""

import torch


def distributed() -> bool:
    """Whether a process group is up."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def ranks() -> tuple[int, int]:
    """(this rank, how many there are)."""
    if distributed():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def all_reduce(*tensors: torch.Tensor) -> None:
    """Sums over the ranks."""
    if ranks()[1] > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def broadcast(*tensors: torch.Tensor) -> None:
    """Rank 0's values for every rank."""
    if ranks()[1] > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


def numbering(found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(this rank's first numbers [G], numbers [G] of all ranks) where this rank has found [G] of them."""
    rank, count = ranks()
    if count == 1:
        return torch.zeros_like(found), found
    table = found.new_zeros((count, *found.shape))
    table[rank] = found
    all_reduce(table)
    return table[:rank].sum(0), table.sum(0)


def rows_at(rows: torch.Tensor, shares: torch.Tensor, first: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The rows [G, M, C] that these numbers of all ranks belong to, on every rank; zeros at numbers beyond them.

    Args:
        rows: [N, G, C] of this rank; N may be 0.
        shares: [N, G], how many numbers each has: 0 leaves it out.
        first: [G], the first number of this rank.
        numbers: [G, M].
    """
    picked = rows.new_zeros((*numbers.shape, rows.shape[-1]))
    if rows.shape[0]:
        upto = shares.cumsum(0).t().contiguous()
        local = numbers - first[:, None]
        mine = (local >= 0) & (local < upto[:, -1:])
        place = torch.searchsorted(upto, local + 1).clamp(max=rows.shape[0] - 1)
        found = rows.transpose(0, 1).gather(1, place[..., None].expand(-1, -1, rows.shape[-1]))
        picked = torch.where(mine[..., None], found, 0)
    all_reduce(picked)
    return picked


def mixed(numbers: torch.Tensor) -> torch.Tensor:
    """32 bits for each int64 number in [0, 2^32) that look random; no product leaves 63 bits."""
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return numbers ^ (numbers >> 16)


def spread(place: torch.Tensor, draws: torch.Tensor, total: torch.Tensor, seed: torch.Tensor):
    """(numbers, found): numbers below `total`, one at random from each of as many equal stretches as there are draws.

    No two are equal. Of more draws than numbers those find nothing whose stretch is empty. Where `total` is a little off, the
    numbers are. draws * total has to stay below 2^63 and total below 2^43.

    Args:
        place: which stretch, in [0, draws).
        draws: how many there are.
        total: how many numbers.
        seed: of the draw, in [0, 2^32).
    """
    start, end = (p * total // draws.clamp_min(1) for p in (place, place + 1))
    jitter = mixed((mixed(seed & 0xFFFFFFFF) + place) & 0xFFFFFFFF) >> 12
    return start + ((jitter * (end - start)) >> 20), end > start
