"""What tokenizer and discriminator minimise, from one table of weights, with every term by name for the log.

    L   = sum_t weight_t L_t + s(step) weight_adv w L_adv        w = 1, or the adaptive weight
    L_d = weight_d L_disc + weight_con L_consistency + weight_lecam L_LeCam

s is the ramp of the adversarial term. A term with weight 0 is not computed: before the ramp starts nobody runs the discriminator.

Source: TokenFlow, section 3 and table 11; UniTok, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenflow.losses import _check, adversarial
from tokenflow.losses.adversarial import Ramp
from tokenflow.losses.augment import diffaug
from tokenflow.losses.blur import Fade, gaussian_blur
from tokenflow.losses.contrastive import contrastive_loss
from tokenflow.losses.distillation import KINDS, distillation_loss


@dataclass(frozen=True)
class Weights:
    """Weights of the terms and the options of the adversarial game.

    Attributes:
        l1: of mean |x' - x|.
        mse: of mean (x' - x)^2.
        perceptual: of the perceptual distance.
        semantic: of the distillation.
        quantizer: of the quantizer's loss, codebook and commitment.
        entropy: of the entropy loss.
        contrastive: of CLIP's loss.
        adversarial: of the generator's loss.
        discriminator: of the discriminator's loss.
        consistency: of its consistency under augmentation.
        lecam: of its LeCam regulariser.
        kind: "hinge" or "non_saturating".
        adaptive: limits of the adaptive weight; None for none.
        ramp: of the adversarial term; the discriminator learns from its first step with a weight on, by its full loss.
        fade: of the blur of what the discriminator sees.
        augment: whether the generator's step shows the discriminator augmented reconstructions (colour, translation).
        cutout: side of the holes that the consistency cuts, over the picture's.
        perceptual_side: smallest height of pictures with a perceptual term.
        perceptual_start: first step with one.
        perceptual_pictures: how many pictures of a batch it looks at, the first ones; 0 for all.

    Raises:
        ValueError: a weight that is negative or not finite, an unknown kind, limits out of order, or a cutout above 1.

    Example:
        >>> Weights.tokenflow().adversarial, Weights.unitok(steps_per_epoch=1000).ramp
        (0.5, Ramp(start=375, length=30))
    """

    l1: float = 0.0
    mse: float = 1.0
    perceptual: float = 1.0
    semantic: float = 0.0
    quantizer: float = 1.0
    entropy: float = 0.0
    contrastive: float = 0.0
    adversarial: float = 0.0
    discriminator: float = 1.0
    consistency: float = 0.0
    lecam: float = 0.0
    kind: str = "hinge"
    adaptive: tuple[float, float] | None = None
    ramp: Ramp = Ramp()
    fade: Fade = Fade()
    augment: bool = False
    cutout: float = 0.2
    perceptual_side: int = 0
    perceptual_start: int = 0
    perceptual_pictures: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not 0 <= value < math.inf:
                raise ValueError(f"Weights: {field.name}: wanted a finite number >= 0, got {value}")
        _check.one_of("Weights", "kind", self.kind, adversarial.KINDS)
        # These are used only where the ramp starts, which would be late for an error.
        if self.cutout > 1:
            raise ValueError(f"Weights: cutout: wanted a number in [0, 1], got {self.cutout}")
        if self.adaptive is not None and not 0 <= self.adaptive[0] <= self.adaptive[1]:
            raise ValueError(f"Weights: adaptive: wanted limits 0 <= low <= high, got {self.adaptive}")

    @classmethod
    def tokenflow(cls) -> Weights:
        """TokenFlow's: the adversarial term and the discriminator's loss with 0.5 from step 20,000."""
        return cls(semantic=1.0, entropy=1.0, adversarial=0.5, discriminator=0.5, ramp=Ramp(20_000))

    @classmethod
    def unitok(cls, steps_per_epoch: int) -> Weights:
        """UniTok's: the adversarial term from 0.375 epochs on, its ramp 0.03 epochs, the blur's fade twice that."""
        _check.at_least("Weights.unitok", "steps_per_epoch", steps_per_epoch, 1)
        start, length = round(0.375 * steps_per_epoch), round(0.03 * steps_per_epoch)
        return cls(
            l1=0.2,
            contrastive=1.0,
            adversarial=0.4,
            consistency=4.0,
            adaptive=adversarial.UNITOK_RANGE,
            ramp=Ramp(start, length),
            fade=Fade(2.0, start, 2 * length),
            augment=True,
            perceptual_side=48,
        )


class Loss(NamedTuple):
    """A weighted sum to call backward on, and its terms by name, unweighted and without gradient."""

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """Both losses of a training step. The discriminator stays outside: it has an optimiser and perhaps a wrapper of its own.

    Args:
        weights: of the terms.
        perceptual: `metric(a, b)` -> [B], see `load_perceptual`.
        distillation: "cosine" or "l2".

    Raises:
        ValueError: a perceptual weight above 0 without a metric, or an unknown distillation.

    Example:
        >>> from tokenflow.losses.patchgan import PatchGAN
        >>> objective = Objective(Weights(l1=1.0, perceptual=0.0, adversarial=0.5, ramp=Ramp(start=10)))
        >>> x, decoder, judge = torch.zeros(2, 3, 32, 32), torch.nn.Conv2d(3, 3, 1), PatchGAN(base=8)
        >>> loss = objective.generator(0, x, decoder(x), discriminator=judge)
        >>> sorted(loss.terms), objective.discriminator(0, x, decoder(x), judge)
        (['l1', 'mse'], None)
        >>> objective.generator(10, x, decoder(x), discriminator=judge).total.backward()
        >>> sorted(objective.discriminator(10, x, decoder(x), judge).terms)
        ['discriminator', 'fake', 'real']
    """

    def __init__(self, weights: Weights, *, perceptual: nn.Module | None = None, distillation: str = "cosine") -> None:
        super().__init__()
        if weights.perceptual and perceptual is None:
            raise ValueError(
                f"Objective: perceptual: wanted a metric for its weight {weights.perceptual}, got None: "
                "see load_perceptual, or set the weight to 0"
            )
        _check.one_of("Objective", "distillation", distillation, KINDS)
        self.weights, self.distillation = weights, distillation
        self.perceptual = None if perceptual is None else perceptual.requires_grad_(False).eval()
        self.lecam = adversarial.LeCam() if weights.lecam else None

    def train(self, mode: bool = True) -> Objective:
        """Training mode for all but the metric."""
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def adversarial_weight(self, step: int) -> float:
        """s(step) weight_adv; the discriminator is run where it is above 0."""
        return self.weights.adversarial * self.weights.ramp(step) if self.weights.adversarial else 0.0

    def generator(
        self,
        step: int,
        images: Tensor,
        reconstruction: Tensor,
        *,
        quantizer: Tensor | None = None,
        entropy: Tensor | None = None,
        semantic: tuple[Tensor, Tensor] | None = None,
        contrastive: tuple[Tensor, Tensor, Tensor] | None = None,
        discriminator: nn.Module | None = None,
        last_layer: Tensor | None = None,
    ) -> Loss:
        """The tokenizer's loss. A term whose input is None is left out.

        Args:
            step: of the training.
            images: [B, 3, H, W] in [-1, 1].
            reconstruction: [B, 3, H, W].
            quantizer: the quantizer's loss, 0-dim.
            entropy: the entropy loss, 0-dim.
            semantic: (student [B, D, h, w], teacher [B, D, H, W]), see `distillation_loss`.
            contrastive: (image [B, D], text [B, D], scale), see `contrastive_loss`: all ranks give it, or none.
            discriminator: wanted where `adversarial_weight(step)` is above 0; its parameters get no gradient.
            last_layer: weight of the decoder's last convolution, for the adaptive weight.

        Raises:
            TypeError: images that are not floats.
            ValueError: other shapes, or no discriminator or last layer where one is wanted.
        """
        _check.images("Objective", "images", images)
        _check.alike("Objective", "reconstruction", reconstruction, images)
        weights = self.weights
        difference = _full(reconstruction) - _full(images)
        terms: dict[str, Tensor] = {}
        if weights.l1:
            terms["l1"] = _check.mean(difference.abs())
        if weights.mse:
            terms["mse"] = _check.mean(difference.square())
        if weights.perceptual and images.shape[2] >= weights.perceptual_side and step >= weights.perceptual_start:
            seen = slice(weights.perceptual_pictures or None)
            terms["perceptual"] = _check.mean(self.perceptual(reconstruction[seen], images[seen]))
        # Zero times a sum keeps the graph where every weight is zero.
        pixels = self._sum(terms) if terms else 0.0 * difference.sum()
        other = {}
        if weights.semantic and semantic is not None:
            other["semantic"] = distillation_loss(*semantic, self.distillation)
        if weights.quantizer and quantizer is not None:
            other["quantizer"] = quantizer
        if weights.entropy and entropy is not None:
            other["entropy"] = entropy
        if weights.contrastive and contrastive is not None:
            other["contrastive"] = contrastive_loss(*contrastive)
        total = pixels + self._sum(other) if other else pixels
        terms.update(other)
        weight = self.adversarial_weight(step)
        if weight:
            if discriminator is None:
                raise ValueError(f"Objective: discriminator: wanted one at step {step}, got None")
            terms["adversarial"] = self._adversarial(step, reconstruction, discriminator)
            if weights.adaptive is not None:
                if last_layer is None:
                    raise ValueError("Objective: last_layer: wanted a weight for the adaptive weight, got None")
                terms["adaptive_weight"] = adversarial.adaptive_weight(
                    pixels, terms["adversarial"], last_layer, limits=weights.adaptive
                )
                weight = weight * terms["adaptive_weight"]
            total = total + weight * terms["adversarial"]
        return Loss(total, {name: term.detach() for name, term in terms.items()})

    def discriminator(self, step: int, images: Tensor, reconstruction: Tensor, discriminator: nn.Module) -> Loss | None:
        """The discriminator's loss, None at steps where it is not run; "real", "fake" are the means of what it says.

        Args:
            step: of the training.
            images: [B, 3, H, W] in [-1, 1].
            reconstruction: [B, 3, H, W]; gets no gradient.
            discriminator: [B, 3, H, W] -> any shape that begins with B.

        Raises:
            TypeError: images that are not floats.
            ValueError: other shapes.
        """
        _check.images("Objective", "images", images)
        _check.alike("Objective", "reconstruction", reconstruction, images)
        if not self.adversarial_weight(step):
            return None
        weights = self.weights
        seen = [self._blurred(step, _full(x.detach())) for x in (images, reconstruction)]
        if weights.consistency:
            seen += [diffaug(x, cutout=weights.cutout) for x in seen]
        if getattr(_bare(discriminator), "joint", False):
            said = discriminator(torch.cat(seen)).split(len(images))
            said = said if len(images) else said * len(seen)
        else:
            said = [discriminator(x) for x in seen]
        said = [_full(s) for s in said]
        real, fake = said[:2]
        terms = {"discriminator": adversarial.discriminator_loss(real, fake, weights.kind)}
        if weights.consistency:
            terms["consistency"] = adversarial.consistency_loss(real, said[2], fake, said[3])
        if self.lecam is not None:
            terms["lecam"] = self.lecam(real, fake)
        logged = {**terms, "real": _check.mean(real), "fake": _check.mean(fake)}
        return Loss(self._sum(terms), {name: term.detach() for name, term in logged.items()})

    def _sum(self, terms: dict[str, Tensor]) -> Tensor:
        return sum(getattr(self.weights, name) * term for name, term in terms.items())

    def _adversarial(self, step: int, reconstruction: Tensor, discriminator: nn.Module) -> Tensor:
        seen = self._blurred(step, _full(reconstruction))
        if self.weights.augment:
            seen = diffaug(seen, ("colour", "translation"))
        with adversarial.frozen(_bare(discriminator)) as judge:
            return adversarial.generator_loss(_full(judge(seen)), self.weights.kind)

    def _blurred(self, step: int, images: Tensor) -> Tensor:
        sigma = self.weights.fade(step)
        return gaussian_blur(images, sigma) if sigma else images


def _full(x: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _bare(module: nn.Module) -> nn.Module:
    """The module inside DDP's wrapper, which wants a backward for each forward."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
