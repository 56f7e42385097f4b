"""ST-LPIPS: shift-tolerant perceptual distance with an AlexNet trunk.

    d(a, b) = sum_l mean_{h,w} w_l . (u_l(a) - u_l(b))^2,   u_l = unit channel vectors of the l-th ReLU

The trunk differs from AlexNet's in three points: the first convolution has stride 1, strides are replaced by a binomial blur
with stride 2 over reflected borders, and the first blur stands before the ReLU. Lower is closer; the number is not LPIPS.

Source: Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric", ECCV 2022; the weights are the file of the PyPI
package stlpips-pytorch (BSD-2), of which nothing is imported. Install it with `pip install --no-deps stlpips-pytorch`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "stlpips_pytorch"
WEIGHTS = Path("weights") / "vST0.0" / "alex_shift_tolerant.pth"
CONVOLUTIONS = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")
PADDING = (2, 2, 1, 1, 1)
SMALLEST = 21
"""Side below which the last blur has too little to reflect."""


def weights_path() -> Path | None:
    """The installed weight file, None without the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / WEIGHTS
    return path if path.exists() else None


class STLPIPS(nn.Module):
    """Distance of two batches of pictures, frozen weights.

    Args:
        state: the state dict of the weight file.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name in ("shift", "scale"):
            self.register_buffer(name, state[f"scaling_layer.{name}"].float())
        for level, (name, _) in enumerate(zip(CONVOLUTIONS, PADDING, strict=True)):
            self.register_buffer(f"weight{level}", state[f"net.{name}.weight"].float())
            self.register_buffer(f"bias{level}", state[f"net.{name}.bias"].float())
            self.register_buffer(f"head{level}", state[f"lin{level}.model.1.weight"].float().flatten())
        binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur_kernel", torch.outer(binomial, binomial).view(1, 1, 3, 3))

    @classmethod
    def installed(cls) -> STLPIPS | None:
        """The metric with the installed weights; None where the package is missing."""
        path = weights_path()
        return None if path is None else cls(torch.load(path, map_location="cpu", weights_only=True)).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B] of a and b [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: a side below 21.
        """
        if min(a.shape[2:]) < SMALLEST:
            raise ValueError(f"ST-LPIPS: a: wanted sides of at least {SMALLEST}, got {list(a.shape[2:])}")
        # One call for both would send gradients through originals, which nobody asks for.
        with torch.set_grad_enabled(torch.is_grad_enabled() and b.requires_grad):
            wanted = [F.normalize(feature.float(), dim=1, eps=1e-10) for feature in self.features(b)]
        total = 0.0
        for level, feature in enumerate(self.features(a)):
            difference = (F.normalize(feature.float(), dim=1, eps=1e-10) - wanted[level]).square()
            total = total + torch.einsum("bchw,c->bhw", difference, getattr(self, f"head{level}")).mean((1, 2))
        return total

    def features(self, images: Tensor) -> list[Tensor]:
        """The five ReLU maps of images [B, 3, H, W] in [-1, 1]."""
        h = self._blur(self._convolve((images - self.shift) / self.scale, 0)).relu()
        maps = [h]
        for level in range(1, 5):
            if level < 3:
                h = self._blur(F.max_pool2d(h, 3, stride=1))
            h = self._convolve(h, level).relu()
            maps.append(h)
        return maps

    def _convolve(self, x: Tensor, level: int) -> Tensor:
        return F.conv2d(x, getattr(self, f"weight{level}"), getattr(self, f"bias{level}"), padding=PADDING[level])

    def _blur(self, x: Tensor) -> Tensor:
        kernel = self.blur_kernel.to(x.dtype).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])
