"""A Gaussian blur that fades: what the discriminator sees at the start of its training.

    blur(x) = k_sigma * x,  k_sigma(i) ~ exp(-i^2 / (2 sigma^2)), |i| <= ceil(3 sigma);   sigma(step) = sigma_0 max(0, 1 - step / length)

Blurred pictures and blurred reconstructions differ little, so a discriminator that has learned nothing yet cannot win by
details. Borders are repeated.

Source: Karras et al., "Alias-Free Generative Adversarial Networks", NeurIPS 2021, appendix D; UniTok fades over twice the
warm-up of its adversarial term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.losses import _check


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Images [B, 3, H, W] blurred; sigma 0 gives the images themselves.

    Args:
        images: [B, 3, H, W].
        sigma: standard deviation in pixels, >= 0.

    Raises:
        TypeError: images that are not floats.
        ValueError: another shape, or a negative sigma.

    Example:
        >>> x = torch.zeros(1, 3, 1, 5)
        >>> x[..., 2] = 1
        >>> [round(v, 3) for v in gaussian_blur(x, 0.5)[0, 0, 0].tolist()]
        [0.0, 0.106, 0.786, 0.106, 0.0]
    """
    _check.images("gaussian_blur", "images", images)
    _check.at_least("gaussian_blur", "sigma", sigma, 0)
    radius = math.ceil(3 * sigma)
    if radius == 0 or images.numel() == 0:
        return images
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float64)
    kernel = (-steps.square() / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).to(images.dtype)
    x = F.pad(images, (radius, radius, radius, radius), mode="replicate").flatten(0, 1)[:, None]
    x = F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return x.view_as(images)


@dataclass(frozen=True)
class Fade:
    """sigma at a step: `sigma` at step `start`, linear to 0 at `start + length`.

    Attributes:
        sigma: in pixels; 0 is no blur.
        start: step at which the fade starts.
        length: steps.

    Raises:
        ValueError: a negative number.

    Example:
        >>> [Fade(2.0, 10, 4)(step) for step in (0, 10, 11, 14, 20)], Fade()(0)
        ([2.0, 2.0, 1.5, 0.0, 0.0], 0.0)
    """

    sigma: float = 0.0
    start: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        for name in ("sigma", "start", "length"):
            _check.at_least("Fade", name, getattr(self, name), 0)

    def __call__(self, step: int) -> float:
        """The deviation at a step."""
        past = max(0, step - self.start)
        return self.sigma * (1 - past / self.length) if past < self.length else 0.0
