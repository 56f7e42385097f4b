"""entropy_loss in plain PyTorch: how sure each row is of its code, and how evenly the codes are used."""

import torch

from tokenflow_ext.reference._exact import exact
from tokenflow_ext.reference.quantize import concatenate, real_type, scores, searched


@exact
def entropy_loss(x, codebook, *, metric, temperature, weights=None, eps=1e-5):
    """(mean_n H(p_n), -sum_k pbar_k log(pbar_k + eps)) in nats, p = softmax(-distance / temperature), pbar = mean_n p_n.

    Callers minimise the first minus the second. Builds the N x K matrix.

    Args:
        x: rows [..., D] with codebook [K, D], [..., G, D] with [G, K, D] (mean over groups), or T tensors that share an
            index.
        codebook: codes, or T tables [K, D_t].
        metric: "cosine" (distance 2 - 2 cos), "l2" (squared) or "dot" (-x.c).
        temperature: in units of the distance.
        weights: one a shared table, 1 each by default.
        eps: inside the logarithm of the mean; 1e-5 in TokenFlow, 1e-7 in UniTok.

    Returns:
        Two 0-dim tensors, 0 for an empty batch. Rows that are not finite are left out, the denominator N stays; codes that are
        not finite have probability 0.

    Source: TokenFlow, arXiv 2412.03069; Yu et al., 2310.05737.
    """
    if isinstance(x, torch.Tensor):
        dtype = real_type(x, codebook)
        groups = codebook.shape[0] if codebook.dim() == 3 else 1
        x, table = x.to(dtype).reshape(-1, groups, x.shape[-1]), codebook.to(dtype).reshape(groups, -1, x.shape[-1])
        widths, weights = [x.shape[-1]], [1.0]
    else:
        x, table, widths, weights = concatenate(x, codebook, weights)
    good, intact = x.isfinite().all(-1, keepdim=True), table.isfinite().all(-1, keepdim=True)
    good = good & intact.any(1)
    # Who is left out becomes a constant before any arithmetic, so that no gradient of theirs is 0 * inf.
    x, table = torch.where(good, x, 0.0), torch.where(intact, table, 0.0)
    y, codes = searched(x, widths, metric), searched(table, widths, metric)
    # Constants of a row cancel in the softmax: d = 2 s for l2 and cosine, d = s for dot.
    factor = (1.0 if metric == "dot" else 2.0) / temperature
    limits = torch.finfo(x.dtype)
    first = second = x.new_zeros(())
    for g in range(codes.shape[0]):
        logits = -factor * scores(y[:, g], codes[g], widths, weights, metric == "l2")
        log_p = logits.masked_fill(~intact[g, :, 0], limits.min).log_softmax(-1)
        p = log_p.exp()
        share = good[:, g].to(x.dtype) / max(len(x), 1)
        mean = (share * p).sum(0)
        first = first - (share * p * log_p).sum() / codes.shape[0]
        second = second - (mean * (mean + eps).clamp_min(limits.tiny).log()).sum() / codes.shape[0]
    return first, second
