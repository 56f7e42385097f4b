"""UniTok's search as plain PyTorch expressions, restated from its formulas: what grouped codebooks are measured against.

Per chunk k of the channels: y = z / max(|z|, 1e-12), e = E / max(|E|, 1e-12), id = argmax_v y.e_v over an N x V matrix.
Source: UniTok, arXiv 2502.20321, section 3.2.
"""

import torch
import torch.nn.functional as F


def unitok_indices(x: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Ids [N, G] of rows [N, G, D] in codebooks [G, V, D]."""
    chunks = zip(x.unbind(1), codebooks)
    return torch.stack([(F.normalize(z, dim=-1) @ F.normalize(e, dim=-1).T).argmax(1) for z, e in chunks], 1)
