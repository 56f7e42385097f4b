"""Training against a generator's mistakes: some ids are replaced by those of near codes (RobustTok)."""

import torch
from torch import Tensor

from tokenflow_ext import ops


def perturb_codes(
    x: Tensor, codebook: Tensor, *, neighbours: int, probability: float, share: float = 1.0, metric: str = "l2",
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The nearest code of every row, of which some are replaced by a random one of the `neighbours` nearest.

        i_n = the r_n-th nearest code of x_n;   r_n uniform in 1 .. neighbours with `probability`, else 1

    within the first `share` of the batch, the first axis of x; the other samples keep their nearest codes. `lookup` of the ids
    gives what the decoder is trained on.

    Args:
        x: rows [B, ..., D] for a codebook [K, D], or [B, ..., G, D] for [G, K, D].
        codebook: codes, of any float type.
        neighbours: delta, 1 to K; 1 changes nothing.
        probability: alpha, of a row to draw.
        share: beta, of the batch.
        metric: "cosine", "l2" or "dot".
        backend: "auto", "native" or "reference".

    Returns:
        int64 ids [B, ...] (or [B, ..., G]), by torch's generator of x's device.

    Raises:
        ValueError, TypeError: a sentence with function, argument, wanted, got.

    Source: RobustTok, arXiv 2503.08354.

    Example:
        >>> x, codebook = torch.randn(6, 8), torch.randn(64, 8)
        >>> ids = perturb_codes(x, codebook, neighbours=1, probability=1.0)
        >>> bool((ids == ops.nearest_code(x, codebook)).all())
        True
    """
    name = "perturb_codes"
    probability, share = ops._check.share(name, "probability", probability), ops._check.share(name, "share", share)
    ops._check.positive(name, "neighbours", neighbours)
    ops._check.rows_fit(name, x, codebook)
    if x.dim() == codebook.dim() - 1:
        raise ValueError(f"{name}: x: wanted a batch as first axis, got {list(x.shape)}")
    near = ops.nearest_code(x, codebook, metric=metric, topk=neighbours, backend=backend)
    if neighbours == 1:
        return near
    draws = torch.rand(near.shape[:-1], device=x.device) < probability
    draws[int(len(x) * share) :] = False
    rank = torch.randint(neighbours, draws.shape, device=x.device)
    return near.gather(-1, torch.where(draws, rank, 0).unsqueeze(-1)).squeeze(-1)
