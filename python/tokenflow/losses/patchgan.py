"""PatchGAN: a convolutional discriminator that judges overlapping patches.

    conv4/2, leaky  ->  (n_layers - 1) x [conv4/2, norm, leaky]  ->  [conv4/1, norm, leaky]  ->  conv4/1 -> 1

Widths: base, 2 base, 4 base, ... up to 8 base; leaky ReLU 0.2, padding 1. With n_layers 3 each output sees 70 x 70 pixels.

Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017; TokenFlow uses n_layers 3,
base 64, BatchNorm.
"""

from __future__ import annotations

from torch import Tensor, nn

from tokenflow.losses import _check

NORMS = ("batch", "group")
GROUPS = 32


class PatchGAN(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> [B, 1, h, w], H = 256: h = 30 with n_layers 3.

    Args:
        n_layers: how often the side is halved.
        base: channels after the first convolution.
        norm: "batch", as published; or "group", with which a picture's value does not depend on the others, nor on the rank.

    Attributes:
        joint: whether pictures may share a pass without changing each other's values.

    Raises:
        ValueError: n_layers or base below 1, a base that 16 does not divide with "group", or an unknown norm.

    Example:
        >>> PatchGAN(base=16)(torch.zeros(2, 3, 64, 48)).shape
        torch.Size([2, 1, 6, 4])
    """

    def __init__(self, n_layers: int = 3, base: int = 64, *, norm: str = "batch") -> None:
        super().__init__()
        _check.at_least("PatchGAN", "n_layers", n_layers, 1)
        _check.at_least("PatchGAN", "base", base, 1)
        _check.one_of("PatchGAN", "norm", norm, NORMS)
        if norm == "group" and base % (GROUPS // 2):
            raise ValueError(f"PatchGAN: base: wanted a multiple of {GROUPS // 2} for GroupNorm, got {base}")
        self.n_layers, self.joint = n_layers, norm != "batch"
        width = base
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, n_layers + 1):
            out = base * min(2**level, 8)
            layers += [
                # The norm's shift stands for the bias.
                nn.Conv2d(width, out, 4, stride=2 if level < n_layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(out) if norm == "batch" else nn.GroupNorm(GROUPS, out),
                nn.LeakyReLU(0.2),
            ]
            width = out
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(_initialise)

    @property
    def smallest(self) -> int:
        """The smallest side that leaves at least one patch."""
        return 3 * 2**self.n_layers

    def forward(self, images: Tensor) -> Tensor:
        """One number a patch.

        Raises:
            TypeError: images that are not floats.
            ValueError: another shape, or a side below `smallest`.
        """
        _check.images("PatchGAN", "images", images)
        if min(images.shape[2:]) < self.smallest:
            raise ValueError(
                f"PatchGAN: images: wanted sides of at least {self.smallest}, got {list(images.shape[2:])}"
            )
        return self.main(images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
