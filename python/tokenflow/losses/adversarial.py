"""Adversarial losses, the regularisers of the discriminator, the adaptive weight, and when they set in.

    hinge            D: mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))     G: -mean D(x')
    non-saturating   D: mean softplus(-D(x)) + mean softplus(D(x'))        G: mean softplus(-D(x'))

x are pictures, x' reconstructions; D gives a number or a map of numbers a picture.

Source: Lim and Ye, "Geometric GAN", 2017 (hinge); Goodfellow et al., 2014 (non-saturating). TokenFlow and UniTok use hinge.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.losses import _check

KINDS = ("hinge", "non_saturating")
TOKENFLOW_RANGE = (0.0, 1e4)
UNITOK_RANGE = (0.015, 1e4)


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the discriminator minimises, 0-dim; each mean over nothing is 0.

    Args:
        real: D(x), any shape.
        fake: D(x'), any shape.
        kind: "hinge" or "non_saturating".

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0]))
        tensor(0.7500)
    """
    _check.one_of("discriminator_loss", "kind", kind, KINDS)
    if kind == "hinge":
        return _check.mean((1 - real).relu()) + _check.mean((1 + fake).relu())
    return _check.mean(F.softplus(-real)) + _check.mean(F.softplus(fake))


def generator_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the generator minimises, 0-dim.

    Args:
        fake: D(x'), any shape.
        kind: "hinge" or "non_saturating".

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> generator_loss(torch.tensor([2.0, 0.5]))
        tensor(-1.2500)
    """
    _check.one_of("generator_loss", "kind", kind, KINDS)
    return -_check.mean(fake) if kind == "hinge" else _check.mean(F.softplus(-fake))


def consistency_loss(real: Tensor, real_augmented: Tensor, fake: Tensor, fake_augmented: Tensor) -> Tensor:
    """mean (D(T(x)) - D(x))^2 + mean (D(T(x')) - D(x'))^2, 0-dim: D shall not see the augmentation T.

    Args:
        real: D(x).
        real_augmented: D(T(x)), of the same shape.
        fake: D(x').
        fake_augmented: D(T(x')), of the same shape.

    Raises:
        ValueError: shapes that differ.

    Source: Zhao et al., "Improved Consistency Regularization for GANs", AAAI 2021 (balanced: both terms). UniTok: weight 4.

    Example:
        >>> one, zero = torch.ones(3), torch.zeros(3)
        >>> consistency_loss(one, zero, one, one)
        tensor(1.)
    """
    _check.alike("consistency_loss", "real_augmented", real_augmented, real)
    _check.alike("consistency_loss", "fake_augmented", fake_augmented, fake)
    return _check.mean((real_augmented - real).square()) + _check.mean((fake_augmented - fake).square())


class LeCam(nn.Module):
    """mean (D(x) - a_fake)^2 + mean (D(x') - a_real)^2, where a_real, a_fake follow the means of D(x), D(x').

    a <- decay a + (1 - decay) mean over all ranks, starting at the first mean; the loss uses the averages after the update.

    Args:
        decay: in [0, 1).

    Raises:
        ValueError: a decay outside.

    Source: Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data", CVPR 2021. Neither TokenFlow nor
    UniTok uses it; a usual weight is 0.001 to 0.3.

    Example:
        >>> lecam = LeCam(decay=0.9)
        >>> lecam(torch.ones(4), -torch.ones(4)), lecam.real, lecam.fake
        (tensor(8.), tensor(1.), tensor(-1.))
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"LeCam: decay: wanted a number in [0, 1), got {decay}")
        self.decay = decay
        for name in ("real", "fake"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The regulariser, 0-dim. In eval mode the averages stay.

        Args:
            real: D(x), any shape.
            fake: D(x'), any shape.
        """
        if self.training:
            self._update(real, fake)
        return _check.mean((real - self.fake).square()) + _check.mean((fake - self.real).square())

    @torch.no_grad()
    def _update(self, real: Tensor, fake: Tensor) -> None:
        sums = [real.sum(), fake.sum(), real.new_tensor(real.numel()), real.new_tensor(fake.numel())]
        totals = torch.stack([s.to(torch.float64) for s in sums])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        decay = torch.where(self.updates > 0, self.decay, 0.0)
        for average, total, count in zip((self.real, self.fake), totals[:2], totals[2:], strict=True):
            # Without a single value anywhere the average stays.
            average.lerp_(torch.where(count > 0, total / count, average).to(average), (1 - decay).to(average))
        self.updates += 1


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    *,
    limits: tuple[float, float] = TOKENFLOW_RANGE,
) -> Tensor:
    """w = clamp(|d reconstruction / d last| / (|d adversarial / d last| + 1e-6), low, high), a constant, 0-dim.

    With it both losses pull equally at the decoder's last layer. The graph is kept for the backward that follows.

    Args:
        reconstruction: 0-dim, pixel and perceptual terms with their weights.
        adversarial: 0-dim, the generator's loss.
        last_layer: weight of the last convolution, which both depend on.
        limits: (low, high): TOKENFLOW_RANGE is (0, 1e4), UNITOK_RANGE (0.015, 1e4).

    Raises:
        ValueError: limits out of order, or a loss that is not 0-dim.

    Source: Esser et al., "Taming Transformers", CVPR 2021, section 3.1. TokenFlow's recipe offers it and leaves it off.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> round(float(adaptive_weight((3 * w).sum(), (2 * w).sum(), w)), 4)
        1.5
    """
    low, high = limits
    if not 0 <= low <= high:
        raise ValueError(f"adaptive_weight: limits: wanted 0 <= low <= high, got {limits}")
    for name, loss in (("reconstruction", reconstruction), ("adversarial", adversarial)):
        if loss.dim():
            raise ValueError(f"adaptive_weight: {name}: wanted a 0-dim loss, got {list(loss.shape)}")
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-6)).clamp(low, high).detach()


@dataclass(frozen=True)
class Ramp:
    """0 before step `start`, then linear to 1 over `length` steps; length 0 is a jump at `start`.

    Attributes:
        start: first step with a weight above 0 (with length 0: with weight 1).
        length: steps until the weight is 1.

    Raises:
        ValueError: a negative number.

    Example:
        >>> [Ramp(10, 4)(step) for step in (9, 10, 12, 13, 99)], Ramp(10)(9), Ramp(10)(10)
        ([0.0, 0.25, 0.75, 1.0, 1.0], 0.0, 1.0)
    """

    start: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "length"):
            _check.at_least("Ramp", name, getattr(self, name), 0)

    def __call__(self, step: int) -> float:
        """The weight at a step."""
        return min(1.0, max(0.0, (step - self.start + 1) / max(1, self.length)))


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """In this context the module's parameters take no gradient, while gradients still pass through to its input.

    The generator's step needs no gradient in the discriminator. Give it the module itself, not its DDP wrapper.

    Example:
        >>> layer, x = torch.nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
        >>> with frozen(layer):
        ...     y = layer(x)
        >>> y.sum().backward()
        >>> layer.weight.grad is None, x.grad is None
        (True, False)
    """
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield module
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
