"""What the fused ops do not give: losses that leave padded rows out, and the loss of each scale.

They are composed of the search, the gather and the pooled rows; still nothing of size N x K, and no shape depends on data.
"""

from collections.abc import Sequence

import torch

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops._native import real
from tokenflow_ext.quantize._gradients import straight_through
from tokenflow_ext.quantize._losses import two_sided


def masked_quantize(quantizer, rows: torch.Tensor, mask: torch.Tensor) -> Quantized:
    """`Quantizer._quantize` of rows [..., C] (or [..., G, D]) where mask [...] holds, 0 elsewhere."""
    codebook, backend = quantizer.codebook, quantizer.backend
    kept = mask[(..., *(None,) * (rows.dim() - mask.dim()))]
    x = rows.to(real(rows, codebook.table_0)).masked_fill(~kept, 0)
    indices = codebook.search(quantizer._flat(x.detach()), quantizer.weights, backend).reshape(x.shape[:-1])
    finite = x.detach().isfinite().all(-1, keepdim=True)
    y, q = codebook._unit(torch.where(finite, x, 0), backend), codebook.rows(indices, backend, dtype=x.dtype)
    loss = two_sided(quantizer, q, y, kept & finite) / (mask.sum().clamp_min(1) * quantizer.dim)
    value = torch.where(kept, torch.where(finite, q.detach(), torch.nan), 0)
    return Quantized(straight_through(y, value).to(rows.dtype), indices, loss)


def scale_losses(
    quantizer, features: torch.Tensor, indices: torch.Tensor, lengths: Sequence[int], options: dict, mask
) -> list[torch.Tensor]:
    """The loss of each scale, means over the images [B] where mask holds; see `ops.multiscale_quantize` for their formulas.

    Args:
        quantizer: with one group.
        features: [B, C, H, W], finite where mask is False.
        indices: [B, L] of all scales in `options`.
        lengths: ids of each scale.
        options: of `ops.multiscale_quantize`, without the loss weights.
        mask: [B] or None.
    """
    tables = quantizer.codebooks()
    images = features.shape[0] if mask is None else mask.sum()
    if options["loss_on"] == "codes":
        rows = ops.multiscale_rows(features, indices, tables, **options)
        unit = options["metric"] == "cosine" if options["normalize_codes"] is None else options["normalize_codes"]
        q = quantizer.codebook.rows(indices, quantizer.backend, unit=unit, dtype=rows.dtype)
        y = quantizer.codebook._unit(torch.where(rows.detach().isfinite(), rows, 0), quantizer.backend)
        keep = (rows.detach() + q.detach()).isfinite().all(-1, keepdim=True)
        if mask is not None:
            keep = keep & mask[:, None, None]
        parts = (part.split(lengths, dim=1) for part in (q, y, keep))
        return [
            two_sided(quantizer, *part) / _count(images, length * quantizer.dim)
            for *part, length in zip(*parts, lengths, strict=True)
        ]
    decoding = {key: options[key] for key in ("scales", "metric", "phi", "normalize_codes", "backend")}
    x, losses = features.to(real(features, *tables)), []
    for s in range(1, len(lengths) + 1):
        prefix = indices[:, : sum(lengths[:s])]
        f_hat = ops.multiscale_decode(prefix, tables, size=tuple(features.shape[2:]), **decoding)
        keep = (f_hat - x).detach().isfinite().all(1, keepdim=True)
        if mask is not None:
            keep = keep & mask[:, None, None, None]
        losses.append(two_sided(quantizer, f_hat, x, keep) / _count(images, ops._check.count(x.shape[1:])))
    return losses


def _count(images, each: int):
    """images * each, at least 1."""
    return max(images * each, 1) if not isinstance(images, torch.Tensor) else (images * each).clamp_min(1)
