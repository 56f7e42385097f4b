"""Losses of a tokenizer's training: pixels, perception, discriminators, meaning, and their weighted sum."""

from tokenflow.losses.contrastive import clamp_logit_scale_, contrastive_loss
from tokenflow.losses.dino_discriminator import DinoDiscriminator, dinov2_tower
from tokenflow.losses.distillation import distillation_loss
from tokenflow.losses.patchgan import PatchGAN
from tokenflow.losses.perceptual import LPIPS, load_perceptual
from tokenflow.losses.st_lpips import STLPIPS
from tokenflow.losses.total import Loss, Objective, Weights

__all__ = [
    "LPIPS",
    "STLPIPS",
    "DinoDiscriminator",
    "Loss",
    "Objective",
    "PatchGAN",
    "Weights",
    "clamp_logit_scale_",
    "contrastive_loss",
    "dinov2_tower",
    "distillation_loss",
    "load_perceptual",
]
