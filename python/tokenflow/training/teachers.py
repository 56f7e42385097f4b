"""Frozen teachers of the semantic decoder: images [B, 3, H, W] in [-1, 1] -> features [B, D, h, w].

Published models learn from a frozen copy of the tower that their semantic encoder starts from: CLIP's last cells through its
projection, SigLIP's and ViTamin's as they are. tokenflow-tiny learns from EfficientNet-Lite0, reduced to its principal directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenflow import teacher
from tokenflow.files import replacing
from tokenflow.models import TokenFlow, checkpoint, tokenflow_keys
from tokenflow.models.semantic import DEVIATION, MEAN, Tower

PROJECTIONS = (("visual.proj", False), ("visual_projection.weight", True))
"""Names of CLIP's projection, and whether it is stored as a linear layer's weight."""
FITTED_ON = 2048


class TowerTeacher(nn.Module):
    """The frozen tower in a file of CLIP, SigLIP or ViTamin.

    Args:
        tower: its sizes.
        path: the file, see `TokenFlow.load_tower`.
        dim: D.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights of another tower, or features of another width.
    """

    def __init__(self, tower: Tower, path: str | Path, dim: int) -> None:
        super().__init__()
        self.kind, self.tower, self.patch = tower.kind, tower.build(), tower.patch
        state, _ = checkpoint.read(path, TokenFlow.places)
        checkpoint.fit(tokenflow_keys.tower_start(state, tower), self.tower, path, caller="train")
        projection = _projection(state, path) if tower.kind == "clip" else torch.eye(tower.width)
        if projection.shape != (tower.width, dim):
            raise ValueError(
                f"train: tower: wanted features of {dim} channels from {tower.width}, got {path} with {list(projection.shape)}"
            )
        self.register_buffer("projection", projection.float() if tower.kind == "clip" else None)
        # x in [-1, 1] is (x + 1) / 2 in [0, 1].
        for name, values in (("mean", [2 * m - 1 for m in MEAN]), ("deviation", [2 * d for d in DEVIATION])):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = images.clamp(-1, 1)
        if self.kind != "siglip":
            images = (images - self.mean) / self.deviation
        cells = self.tower(images)
        if self.projection is not None:
            cells = cells @ self.projection.to(cells.dtype)
        grid = [n // self.patch for n in images.shape[2:]]
        return cells.reshape(len(images), *grid, -1).permute(0, 3, 1, 2)


def _projection(state: Mapping[str, Tensor], path: str | Path) -> Tensor:
    for name, transposed in PROJECTIONS:
        if name in state:
            return state[name].T if transposed else state[name]
    names = " or ".join(name for name, _ in PROJECTIONS)
    raise ValueError(
        f"train: tower: wanted CLIP's projection as {names} (a whole CLIP, not its tower), got {path} without"
    )


class PrincipalTeacher(nn.Module):
    """EfficientNet-Lite0's features by their principal directions over the data set's pictures, kept in a file.

    Args:
        path: where mean and directions lie, or will.
        images: gives uint8 [N, 3, H, W] to find them from; called where the file is not there.
        dim: D.
        grid: side of the result.
        dtype: the type features are computed in for that.

    Raises:
        Missing: the packages are not installed.
        ValueError: too few pictures.
    """

    def __init__(self, path: Path, images: Callable[[], Tensor], dim: int, grid: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.grid = teacher.load_teacher(), grid
        if not path.exists():
            features = teacher.teacher_features(images(), dtype=dtype)
            if features.shape[0] * features.shape[2] * features.shape[3] <= dim:
                raise ValueError(
                    f"train: data: wanted more pictures for {dim} principal directions, got {len(features)}"
                )
            mean, basis, kept = teacher.principal_directions(features, dim)
            with replacing(path) as temporary:
                save_file({"mean": mean, "basis": basis.contiguous(), "kept": torch.tensor(kept)}, temporary)
        found = load_file(path)
        self.register_buffer("mean", found["mean"])
        self.register_buffer("basis", found["basis"])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features = teacher.features_of(self.network, (images + 1) / 2)
        with torch.autocast(images.device.type, enabled=False):
            return teacher.reduced(features, self.mean, self.basis, self.grid)
