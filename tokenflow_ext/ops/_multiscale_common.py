"""What the registrations of the multi-scale operators share.

Grids travel as a flat list (h, w, row of phi) a scale; several tables as one codebook [K, C] split by widths; phi as
weight [P, C, C, 3, 3] and bias [P, C], or None twice. Images fall into at most 32 chunks whose sums are added in order, a
number that does not depend on the thread count; scratch belongs to a thread.
"""

import torch


def chunks_of(batch: int) -> int:
    """How many chunks the images of a batch fall into."""
    return max(1, min(batch, 32))


def cells_of(grids) -> list[int]:
    """h w of every scale."""
    return [h * w for h, w in zip(grids[::3], grids[1::3])]


def grid_rows(grids) -> torch.Tensor:
    """The grids as the kernels read them, int64 [S, 3]."""
    return torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)


def pieces(like, count: int, size, threads: int):
    """Scratch of the kernels: for each thread so many padded maps of `size` (h, w) and what registers read beyond them."""
    (height, width), channels = size, like.shape[-1]
    return like.new_empty((threads, count, (height + 1) * (width + 2) * channels + 64))


def band_space(like, grids, size):
    """Room for the resampling weights of every scale."""
    return like.new_empty((len(grids) // 3, 2 * sum(size), 6))


def _padded(x):
    """x [..., C] with zeros up to a multiple of 16, contiguous: whole registers of any instruction set."""
    out = x.new_zeros((*x.shape[:-1], -(-x.shape[-1] // 16) * 16))
    out[..., : x.shape[-1]] = x
    return out


def kernels_of(weight, bias):
    """phi as the kernels read it: weight [P, 9, in, D] and bias [P, D], D = C padded; None twice where there is no phi."""
    if weight is None:
        return None, None
    return _padded(weight.permute(0, 3, 4, 2, 1).flatten(1, 2)), _padded(bias)


def turned_kernels_of(weight):
    """The kernels of phi's transpose, [P, 9, out, D], taps turned around; None where there is no phi."""
    return None if weight is None else _padded(weight.permute(0, 3, 4, 1, 2).flatten(1, 2).flip(1))


def phi_numbers(weight) -> int:
    """Numbers in phi, weight and bias together."""
    return 0 if weight is None else weight.numel() + weight.shape[0] * weight.shape[1]


def split_phi(flat, weight):
    """The gradient of phi as the kernels add it up, [P 9 C C] then [P C], in the shapes of weight and bias."""
    rows, channels = weight.shape[:2]
    kernels, bias = flat[: weight.numel()], flat[weight.numel() :]
    kernels = kernels.view(rows, 3, 3, channels, channels).permute(0, 3, 4, 1, 2).contiguous()
    return kernels, bias.view(rows, channels).clone()


def sort_space(indices, codes: int):
    """Workspace of the sort by code: order [N], starts [K + 1]."""
    return torch.empty(indices.numel(), dtype=torch.int64), torch.empty(codes + 1, dtype=torch.int64)


def norms_space(like, shape, unit_codes: bool):
    """code_norms [B, L, T]: written by the kernels where codes are unit, zeros elsewhere."""
    return (like.new_empty if unit_codes else like.new_zeros)(shape)


def refuse_outside(op: str, status, codes: int) -> None:
    """ValueError where a kernel counted ids that are neither in the table nor part of a dropped scale."""
    if int(status):
        raise ValueError(
            f"{op}: indices: wanted ids in [0, {codes}), or -1 for a whole scale, got {int(status)} others"
        )
