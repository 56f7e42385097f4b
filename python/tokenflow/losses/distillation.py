"""Semantic distillation: the semantic decoder shall say of every cell what the frozen teacher says.

    cosine   mean_{b,h,w} (1 - cos(student, teacher))          TokenFlow's code, VQ-KD
    l2       mean_{b,c,h,w} (student - teacher)^2              the distance that TokenFlow's paper names

Source: TokenFlow, section 3; Peng et al., "BEiT v2" (VQ-KD), 2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.losses import _check

KINDS = ("cosine", "l2")


def distillation_loss(student: Tensor, teacher: Tensor, kind: str = "cosine") -> Tensor:
    """The loss, 0-dim, in float32 (float64 for float64); the teacher gets no gradient, a cell of zeros has cosine 0.

    Args:
        student: [B, D, h, w], the decoder's output.
        teacher: [B, D, H, W]; another grid than the student's is brought to it by area averaging.
        kind: "cosine" or "l2".

    Raises:
        ValueError: an unknown kind, shapes that are not maps, or another B or D.

    Example:
        >>> student = torch.eye(2).view(1, 2, 2, 1)
        >>> distillation_loss(student, torch.ones(1, 2, 4, 1))
        tensor(0.2929)
    """
    _check.one_of("distillation_loss", "kind", kind, KINDS)
    if student.dim() != 4:
        raise ValueError(f"distillation_loss: student: wanted [B, D, h, w], got {list(student.shape)}")
    if teacher.dim() != 4 or teacher.shape[:2] != student.shape[:2]:
        b, d = student.shape[:2]
        raise ValueError(f"distillation_loss: teacher: wanted [{b}, {d}, H, W], got {list(teacher.shape)}")
    if torch.float64 not in (student.dtype, teacher.dtype):
        student, teacher = student.float(), teacher.float()
    teacher = teacher.detach()
    if teacher.shape != student.shape:
        teacher = F.adaptive_avg_pool2d(teacher, student.shape[2:]) if len(teacher) else student.detach()
    if kind == "l2":
        return _check.mean((student - teacher).square())
    return _check.mean(1 - F.cosine_similarity(student, teacher, dim=1))
