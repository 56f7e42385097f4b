"""TokenFlow's quantizer as plain PyTorch expressions, restated from its formulas: what shared_quantize is measured against.

Two N x K distance matrices by expanded squares and their sum; a one-hot matrix; the mean of squared distances for the
log; in training an entropy term that is always computed and weighs 0. Gradients by autograd.
Source: TokenFlow, arXiv 2412.03069, section 3.1.
"""

import torch
import torch.nn.functional as F


def distances(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """|x|^2 + |c|^2 - 2 x.c, [N, K]."""
    return x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * torch.einsum("nd,kd->nk", x, codebook)


def entropy(distance: torch.Tensor, temperature: float = 0.01) -> torch.Tensor:
    """mean_n H(p_n) - H(mean_n p_n), p = softmax(-distance / temperature)."""
    logits = -distance / temperature
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


def tokenflow_quantize(
    semantic, pixel, semantic_codes, pixel_codes, *, training: bool, beta: float = 0.25, pixel_weight: float = 1.0
):
    """(quantized [N, 40], ids [N], loss or None) of rows [N, 32] and [N, 8] with tables [K, 32] and [K, 8].

    Tables without a gradient follow their rows by an average: the loss is then the commitment alone.
    """
    rows = [F.normalize(x, dim=-1) for x in (semantic, pixel)]
    codes = [F.normalize(c, dim=-1) for c in (semantic_codes, pixel_codes)]
    by_table = [distances(x, c) for x, c in zip(rows, codes)]
    distance = by_table[0] + pixel_weight * by_table[1]
    logged = [d.square().sum(1).mean() for d in by_table]
    indices = distance.argmin(1)
    one_hot = F.one_hot(indices, distance.shape[1]).to(semantic.dtype)
    y, q = torch.cat(rows, 1), torch.cat([c[indices] for c in codes], 1)
    loss = None
    if training:
        loss = beta * (q.detach() - y).square().mean() + 0.0 * entropy(distance)
        if semantic_codes.requires_grad:
            loss = (q - y.detach()).square().mean() + loss
    del logged, one_hot
    return y + (q - y).detach(), indices, loss
