"""soft_quantize in plain PyTorch: a hard code forward, its softmax backward."""

import torch

from tokenflow_ext.reference._exact import exact
from tokenflow_ext.reference.quantize import gather, real_type


@exact
def soft_quantize(x, keys, values, *, scale=1.0, bias=None):
    """Twin of `tokenflow_ext.ops.soft_quantize`: onehot(argmax s) values, with the gradient of softmax(s) for the one-hot."""
    dtype = real_type(x, keys, values, *([] if bias is None else [bias]))
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    good = rows.isfinite().all(-1, keepdim=True)
    rows, keys, values = torch.where(good, rows, 0.0), keys.to(dtype), values.to(dtype)
    start = keys.new_zeros(len(keys)) if bias is None else bias.to(dtype)
    intact = keys.isfinite().all(-1) & values.isfinite().all(-1) & start.isfinite()
    keys, kept = (torch.where(intact[:, None], part, 0.0) for part in (keys, values))
    start = torch.where(intact, start, 0.0)
    logits = (scale * rows) @ keys.T + start
    logits = logits.masked_fill(~intact, torch.finfo(dtype).min)
    indices = torch.where(good[:, 0], logits.argmax(-1), 0)
    p = logits.softmax(-1)
    # The value is the code bit for bit; the products below are 0 and carry the gradient of p alone.
    soft = torch.where(good, (p - p.detach()) @ kept.detach(), 0.0)
    hard = gather(indices, torch.where(intact[:, None], values, torch.nan))
    hard = torch.where(good, hard + soft, torch.nan)
    return hard.reshape(*x.shape[:-1], values.shape[1]).to(x.dtype), indices.reshape(x.shape[:-1])
