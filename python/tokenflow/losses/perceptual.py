"""LPIPS: perceptual distance in the features of VGG16, and the one door to every perceptual distance.

    d(a, b) = sum_l mean_{h,w} w_l . (u_l(a) - u_l(b))^2,   u_l = f_l / (|f_l| + 1e-10) per cell

f_l are the last ReLUs before the five poolings. Nothing is downloaded: the trunk is torchvision's VGG16 trained on ImageNet
(`vgg16-397923af.pth`), the heads w_l are the file `weights/v0.1/vgg.pth` of the package lpips.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.errors import Missing
from tokenflow.losses import _check
from tokenflow.losses.st_lpips import STLPIPS
from tokenflow.models import checkpoint

# Positions of the convolutions in torchvision's `features`, by stage; a pooling stands before every stage but the first.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST = 16
"""Side below which the last pooling has nothing to pool."""


class LPIPS(nn.Module):
    """LPIPS with a VGG16 trunk, frozen weights.

    Widths are read from the weights, so that a narrow trunk works too.

    Args:
        trunk: VGG16's convolutions, "N.weight" and "N.bias" with torchvision's N, under any prefix.
        heads: "linL.model.1.weight" [1, C_L, 1, 1], L = 0..4, as the package lpips stores them.

    Raises:
        ValueError: a weight is missing or has another shape.

    Example:
        >>> metric = LPIPS(*random_weights(width=2)).eval()
        >>> a = torch.rand(2, 3, 32, 32) * 2 - 1
        >>> metric(a, a).tolist(), metric(a, -a).shape
        ([0.0, 0.0], torch.Size([2]))
    """

    def __init__(self, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        trunk, width = _convolutions(trunk), 3
        for level, stage in enumerate(STAGES):
            for n in stage:
                out = _find("trunk", trunk, f"{n}.bias", (None,)).shape[0]
                weight = _find("trunk", trunk, f"{n}.weight", (out, width, 3, 3))
                self.register_buffer(f"weight{n}", weight.float(), persistent=False)
                self.register_buffer(f"bias{n}", trunk[f"{n}.bias"].float(), persistent=False)
                width = out
            head = _find("heads", heads, f"lin{level}.model.1.weight", (1, width, 1, 1))
            self.register_buffer(f"head{level}", head.float().flatten(), persistent=False)

    @classmethod
    def from_files(cls, trunk: str | Path, heads: str | Path) -> LPIPS:
        """LPIPS with weights read from two files (.pth, .pt or .safetensors), in eval mode.

        Raises:
            Missing: there is no such file.
            ValueError: not the weights of VGG16 or of LPIPS's heads.
        """
        states = []
        for name, path, what in (
            ("trunk", trunk, "torchvision's vgg16-397923af.pth"),
            ("heads", heads, "weights/v0.1/vgg.pth of the package lpips"),
        ):
            if not Path(path).is_file():
                raise Missing(
                    f"LPIPS: {name}: wanted a copy of {what}, which is not downloaded, got {path}: no such file"
                )
            states.append(checkpoint.read(path)[0])
        return cls(*states).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B] of a and b [B, 3, H, W] in [-1, 1].

        Raises:
            TypeError: not floats.
            ValueError: other shapes, or a side below 16.
        """
        _check.images("LPIPS", "a", a)
        _check.alike("LPIPS", "b", b, a)
        if min(a.shape[2:]) < SMALLEST:
            raise ValueError(f"LPIPS: a: wanted sides of at least {SMALLEST}, got {list(a.shape[2:])}")
        if len(a) == 0:
            return (a + b).sum((1, 2, 3))
        total = 0.0
        for level, feature in enumerate(self.features(torch.cat([a, b]))):
            feature = feature if feature.dtype == torch.float64 else feature.float()
            # The norm's gradient at zero is zero here, NaN if written as a square root.
            unit = feature / (torch.linalg.vector_norm(feature, dim=1, keepdim=True) + 1e-10)
            difference = (unit[: len(a)] - unit[len(a) :]).square()
            total = total + torch.einsum("bchw,c->bhw", difference, getattr(self, f"head{level}")).mean((1, 2))
        return total

    def features(self, images: Tensor) -> list[Tensor]:
        """The five ReLU maps of images [B, 3, H, W] in [-1, 1]."""
        h, maps = (images - self.shift) / self.scale, []
        for level, stage in enumerate(STAGES):
            h = F.max_pool2d(h, 2) if level else h
            for n in stage:
                h = F.conv2d(h, getattr(self, f"weight{n}"), getattr(self, f"bias{n}"), padding=1).relu()
            maps.append(h)
        return maps


def load_perceptual(name: str, *, trunk: str | Path | None = None, heads: str | Path | None = None) -> nn.Module:
    """A perceptual distance by name: a frozen module of which `metric(a, b)` gives [B] for a, b [B, 3, H, W] in [-1, 1].

    Args:
        name: "lpips" (VGG16, from two files) or "st-lpips" (AlexNet, from the installed package stlpips-pytorch).
        trunk: VGG16's weights, for "lpips".
        heads: LPIPS's heads, for "lpips".

    Raises:
        Missing: the weights are not there.
        ValueError: no such distance, or "lpips" without its files.

    Example:
        >>> load_perceptual("lpips", trunk="vgg16.pth", heads="vgg.pth")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tokenflow.errors.Missing: LPIPS: trunk: wanted ... got vgg16.pth: no such file
    """
    _check.one_of("load_perceptual", "name", name, ("lpips", "st-lpips"))
    if name == "st-lpips":
        metric = STLPIPS.installed()
        if metric is None:
            raise Missing("ST-LPIPS is not installed: pip install --no-deps stlpips-pytorch")
        return metric
    if trunk is None or heads is None:
        missing = "trunk" if trunk is None else "heads"
        raise ValueError(f"load_perceptual: {missing}: wanted a file with weights for lpips, got None")
    return LPIPS.from_files(trunk, heads)


def random_weights(width: int = 4, *, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random trunk and heads of the right names, `width` channels throughout: to try code without the files."""
    generator = torch.Generator().manual_seed(seed)
    trunk, heads, before = {}, {}, 3
    for level, stage in enumerate(STAGES):
        for n in stage:
            scale = (2 / (9 * before)) ** 0.5
            trunk[f"features.{n}.weight"] = scale * torch.randn(width, before, 3, 3, generator=generator)
            trunk[f"features.{n}.bias"] = 0.1 * torch.randn(width, generator=generator)
            before = width
        heads[f"lin{level}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return trunk, heads


def _convolutions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ "features.N.weight", "net.sliceS.N.weight" and "N.weight" are "N.weight"; the classifier has numbers of its own."""
    found = {}
    for name, value in state.items():
        match = re.fullmatch(r"(?:.*\.)?(\d+\.(?:weight|bias))", name)
        if match and "classifier" not in name:
            found[match[1]] = value
    return found


def _find(argument: str, state: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...]) -> Tensor:
    wanted = ", ".join("C" if n is None else str(n) for n in shape)
    got = list(state[name].shape) if name in state else "nothing"
    fits = name in state and len(got) == len(shape) and all(n in (None, m) for n, m in zip(shape, got, strict=True))
    if not fits:
        raise ValueError(f"LPIPS: {argument}: wanted {name} of shape [{wanted}], got {got}")
    return state[name]
