"""What entropy_loss and soft_quantize share: who is left out, the best codes, and workspace; kernels in csrc/cpu/softmax.h."""

import torch

from tokenflow_ext.ops._native import threads, warn_non_finite

PANEL, BLOCK = 32, 256  # codes a panel and rows a block, csrc/cpu/softmax.h


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def left_out(*parts: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The parts [..., D_t] of each row with zeros where any of it is not finite, and which rows [...] are finite."""
    good = parts[0].isfinite().all(-1)
    for part in parts[1:]:
        good = good & part.isfinite().all(-1)
    return [torch.where(good[..., None], part, 0.0) for part in parts], good


def best_codes(op: str, x: torch.Tensor, codebook: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """Ids [N, G] of the highest products of x [N, G, C] with the codebook [G, K, C]; -1 where `good` [N, G] is False."""
    warn_non_finite(op, (~good).sum().reshape(1))
    (ids,) = torch.ops.tokenflow_ext.nearest_code(x, codebook, "dot")
    return torch.where(good, ids, -1)


def softmax_space(codebook: torch.Tensor, width: int, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Workspace of a kernel for codes [G, K, C] and values of this width: numbers, and a mask.

    The pieces are those of `softmax_of` in csrc/cpu/softmax.h, which refuses a space that is too small.
    """
    _, codes, channels = codebook.shape
    panels = _up(codes, PANEL) // PANEL
    chunks = -(-panels // min(-(-panels // 32), 32))
    padded, wide, values = _up(channels, 8), _up(channels, 16), _up(width, 8)
    size = panels * PANEL * (channels + 1) + BLOCK * (padded + 4 + 2 * chunks)
    size += threads() * (PANEL * (padded + values + 2 * PANEL) + wide + 16)
    if backward:
        size += panels * PANEL * (wide + padded + 1 + width) + BLOCK * (chunks * wide + values)
    return codebook.new_empty(size + 16 * 16), torch.empty((panels, 4), dtype=torch.int64)
