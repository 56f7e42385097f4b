"""EfficientNet-Lite0's features of pictures: what kernel distance is measured in where no Inception weights can be had."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.teacher import MEAN, SCALE, load_teacher

SMALL, LARGE = 128, 224


class LiteFeatures:
    """Mean over the last map, [n, 1280], of uint8 images [n, 3, H, W].

    Raises:
        Missing: the packages with the network and its weights are not installed.
    """

    def __init__(self, size: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.side = SMALL if max(size) <= SMALL else LARGE
        self.network = load_teacher().to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        x = ((x - MEAN) / SCALE).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))

    def __str__(self) -> str:
        return f"EfficientNet-Lite0 features at {self.side} x {self.side}"
