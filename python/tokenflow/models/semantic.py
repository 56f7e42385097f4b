"""TokenFlow's semantic networks: a tower and a small head in front of the codes, a shallow transformer behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenflow.models.precision import in_full
from tokenflow.models.vit import VisionTransformer
from tokenflow.models.vitamin import ViTamin

# What shapes do not show of a tower: norms, activation, and the range it was trained on.
VITS = {
    "clip": {
        "activation": "quick_gelu",
        "eps": 1e-5,
        "class_token": True,
        "patch_bias": False,
        "pre_norm": True,
        "post_norm": True,
    },
    "siglip": {"activation": "gelu_tanh", "eps": 1e-6},
}

# Mean and deviation of ViTamin's training pictures in [0, 1]: those of CLIP.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        kind: "clip" (images stay in [-1, 1], as the authors feed it), "siglip" (the last block and what follows it are not part
            of it) or "vitamin" (images are normalised by CLIP's mean and deviation).
        width: channels.
        depth: number of blocks.
        heads: number of heads.
        hidden: width of the MLPs.
        patch: side of a patch.
        grid: side of the grid that its positions were learned on; ViTamin has none and takes any.
        stages: channels of ViTamin's convolutional stages.
    """

    kind: str
    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    grid: int
    stages: tuple[int, ...] = ()

    def build(self) -> nn.Module:
        """A module from images [B, 3, H, W] to [B, h, w, width], or ViTamin's [B, h w, width].

        Raises:
            ValueError: an unknown kind.
        """
        if self.kind == "vitamin":
            return ViTamin(self.stages, self.width, depth=self.depth, heads=self.heads, final_norm=False)
        if self.kind not in VITS:
            raise ValueError(f"Tower: kind: wanted one of {', '.join(VITS)}, vitamin, got {self.kind!r}")
        return VisionTransformer(
            3,
            self.width,
            depth=self.depth,
            heads=self.heads,
            hidden=self.hidden,
            patch=self.patch,
            grid=self.grid,
            **VITS[self.kind],
        )


def head(width: int, out: int) -> nn.Sequential:
    """Linear, tanh, Linear."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


class SemanticEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> [B, dim, h, w]."""

    def __init__(self, tower: Tower, dim: int) -> None:
        super().__init__()
        self.config = tower
        self.tower, self.head = tower.build(), head(tower.width, dim)
        # x in [-1, 1] is (x + 1) / 2 in [0, 1].
        for name, values in (("mean", [2 * m - 1 for m in MEAN]), ("deviation", [2 * d for d in DEVIATION])):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.config.kind != "clip":
            images = images.clamp(-1, 1)
        if self.config.kind == "vitamin":
            images = (images - self.mean) / self.deviation
        grid = tuple(n // self.config.patch for n in images.shape[2:])
        hidden = self.head[1](self.head[0](self.tower(images)))
        return in_full(self.head[2], hidden).reshape(len(images), *grid, -1).permute(0, 3, 1, 2)


class SemanticDecoder(nn.Module):
    """Semantic codes [B, dim, h, w] -> [B, out, h, w]: what the teacher would say."""

    def __init__(self, dim: int, width: int, out: int, *, depth: int, heads: int, grid: int) -> None:
        super().__init__()
        self.body = VisionTransformer(
            dim,
            width,
            depth=depth,
            heads=heads,
            hidden=4 * width,
            patch=1,
            grid=grid,
            class_token=True,
            post_norm=True,
        )
        self.head = head(width, out)

    def forward(self, codes: Tensor) -> Tensor:
        if len(codes) == 0:
            return codes.new_zeros(0, self.head[2].out_features, *codes.shape[2:])
        return self.head(self.body(codes)).permute(0, 3, 1, 2)
