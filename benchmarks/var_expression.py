"""VAR's multi-scale quantizer as plain PyTorch expressions, restated from its formulas: what the VAR sizes are measured against.

Ten grids on a 16 x 16 map; an N x K distance matrix by an outer sum and addmm_; F.interpolate area and bicubic; phi as
conv2d, shared by neighbouring scales. Gradients by autograd. Source: VAR, arXiv 2404.02905, algorithms 1 and 2.
"""

import torch
import torch.nn.functional as F

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
ASSIGNMENT = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]  # which of the four phi serves each scale
RATIO = 0.5


def var_quantize(features, codebook, weight, bias, *, training: bool, beta: float = 0.25):
    """(quantized [B, C, H, W], ids [B, L], loss or None) of features [B, C, H, W] with a codebook [K, C].

    Args:
        features: f [B, C, H, W].
        codebook: raw codes [K, C].
        weight: phi's kernels [P, C, C, 3, 3].
        bias: phi's biases [P, C].
        training: whether the loss is computed and `quantized` is straight-through.
        beta: weight of the commitment term.
    """
    (batch, channels), size = features.shape[:2], features.shape[2:]
    residual, total, loss, ids = features.detach().clone(), torch.zeros_like(features), 0.0, []
    codes = codebook.detach()
    for s, (n, p) in enumerate(zip(SCALES, ASSIGNMENT)):
        last = s == len(SCALES) - 1
        pooled = residual if last else F.interpolate(residual, size=(n, n), mode="area")
        rows = pooled.permute(0, 2, 3, 1).reshape(-1, channels)
        distance = rows.square().sum(1, keepdim=True) + codes.square().sum(1)
        distance.addmm_(rows, codes.T, alpha=-2, beta=1)
        index = distance.argmin(1).view(batch, n, n)
        step = F.embedding(index, codebook).permute(0, 3, 1, 2)
        step = step.contiguous() if last else F.interpolate(step, size=size, mode="bicubic")
        step = (1 - RATIO) * step + RATIO * F.conv2d(step, weight[p], bias[p], padding=1)
        total, residual = total + step, residual - step.detach()
        ids.append(index.flatten(1))
        if training:
            loss = loss + beta * F.mse_loss(total.detach(), features) + F.mse_loss(total, features.detach())
    quantized = features + (total - features).detach() if training else total
    return quantized, torch.cat(ids, 1), loss / len(SCALES) if training else None
