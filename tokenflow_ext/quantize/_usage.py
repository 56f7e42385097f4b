"""Usage and perplexity of codes from how often each was hit, and the warning that only a few are."""

import warnings

import torch

from tokenflow_ext.quantize import _ranks

ROWS_PER_CODE = 16
"""Rows a code on average before a codebook is judged."""
COLLAPSED = 0.05
"""Perplexity over K below which it has collapsed."""
EVERY = 100
"""Training steps between two looks, on the CPU."""


def count(ids: torch.Tensor, good: torch.Tensor, codes: int) -> torch.Tensor:
    """How often each code was chosen, int64 [G, K], by ids [N, G] where good [N, G] holds; nothing waits for the device."""
    groups = ids.shape[1]
    offset = torch.arange(groups, device=ids.device) * codes
    hits = torch.zeros(groups * codes, dtype=torch.int64, device=ids.device)
    return hits.scatter_add_(0, (ids + offset).reshape(-1), good.to(torch.int64).reshape(-1)).view(groups, codes)


def known_part(owner: str, per: str | None, part: str) -> str | None:
    """`per` if it is None or names the part that is measured alone."""
    if per not in (None, part):
        raise ValueError(f"{owner}: per: wanted None or {part!r}, got {per!r}")
    return per


def over_ranks(hits: torch.Tensor, all_ranks: bool) -> torch.Tensor:
    """hits [R, K] summed over the ranks, or this rank's."""
    hits = hits.clone()
    if all_ranks:
        _ranks.all_reduce(hits)
    return hits


def usage(hits: torch.Tensor) -> torch.Tensor:
    """Share of the K codes that were hit, [R]."""
    return (hits > 0).double().mean(-1)


def perplexity(hits: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the hits, [R]; 0 before any."""
    total = hits.sum(-1, keepdim=True)
    share = hits.double() / total.clamp_min(1)
    return torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def warn_non_finite(owner: str, rows: int) -> None:
    """Warns, for the one time that the owner does, of rows that are not finite."""
    warnings.warn(
        f"{owner}: {rows} rows hold NaN or inf; they get the lowest id and are left out of loss, statistics and gradients; "
        "said once, non_finite_rows() counts on",
        RuntimeWarning,
        stacklevel=6,
    )


def warn_collapse(owner: str, hits: torch.Tensor, threshold: float) -> bool:
    """Warns where a codebook of hits [G, K] that has seen enough rows uses few codes; whether it did. Waits for the device."""
    codes = hits.shape[-1]
    rows, even = hits.sum(-1), perplexity(hits)
    collapsed = (rows >= ROWS_PER_CODE * codes) & (even < threshold * codes)
    if not bool(collapsed.any()):
        return False
    worst = int(even.masked_fill(~collapsed, float("inf")).argmin())
    warnings.warn(
        f"{owner}: the codebook collapses: {int(rows[worst])} rows since reset_usage() hit {int((hits[worst] > 0).sum())} of "
        f"{codes} codes, perplexity {float(even[worst]):.1f}; kmeans_init, dead_code_threshold or entropy_weight keep codes alive",
        RuntimeWarning,
        stacklevel=4,
    )
    return True
