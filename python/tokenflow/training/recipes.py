"""The recipe of every preset: what its authors published; nothing here imports torch.

TokenFlow: the paper's table 11 and its training code. UniTok: its training code; crop and flip are CLIP's, which it does not
tell. VAR never published how its VQVAE was trained: the terms are the paper's, the numbers TokenFlow's with VQGAN's adaptive
weight. tokenflow-tiny: found here on two CPU cores.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenflow.training.config import AdversaryConfig, Config, LogConfig, LossConfig, OptimizerConfig, PictureConfig

TOKENFLOW = Config(
    "tokenflow-b",
    loss=LossConfig(semantic=1.0),
    adversary=AdversaryConfig(adversarial=0.5, discriminator_weight=0.5, adversarial_from=20_000),
)
HALF = replace(TOKENFLOW.optimizer, steps=500_000)
UNITOK = Config(
    "unitok-l",
    picture=PictureConfig(smallest_crop=0.9, flip=False),
    loss=LossConfig(l1=0.2, perceptual_side=48, contrastive=1.0),
    adversary=AdversaryConfig(
        adversarial=0.4,
        discriminator="dino",
        adversarial_from=0.375,
        adversarial_warmup=0.03,
        adaptive=(0.015, 1e4),
        blur=2.0,
        blur_fade=0.06,
        augment=True,
        consistency=4.0,
        discriminator_rate=2e-5,
        discriminator_betas=(0.5, 0.9),
        discriminator_decay=0.2,
        discriminator_clip=10.0,
    ),
    optimizer=OptimizerConfig(
        steps=78_125,
        batch=16_384,
        rate=5e-4,
        eps=1e-6,
        weight_decay=0.02,
        clip=10.0,
        warmup=0.01,
        schedule="cosine",
        floor=0.1,
        average=0.0,
        checkpointing=True,
    ),
)
VQVAE = Config(
    "var-vqvae",
    adversary=AdversaryConfig(adversarial=0.5, adversarial_from=20_000, adaptive=(0.0, 1e4)),
    optimizer=OptimizerConfig(steps=250_000),
)
TINY = Config(
    "tokenflow-tiny",
    picture=PictureConfig(crop="centre"),
    loss=LossConfig(
        l1=1.0, semantic=0.5, perceptual=0.2, metric="st-lpips", perceptual_from=0.5, perceptual_pictures=4
    ),
    optimizer=OptimizerConfig(
        steps=4000,
        batch=8,
        rate=1.5e-3,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        matrix_rate=2e-3,
        warmup=50,
        schedule="cosine",
        floor=0.02,
        average=0.998,
        revive_until=0.8,
    ),
    log=LogConfig(log_every=10, save_every=200, pictures_every=500),
)
RECIPES = {
    name: replace(recipe, preset=name, out=Path("runs") / name)
    for name, recipe in {
        "tokenflow-tiny": TINY,
        "tokenflow-b": TOKENFLOW,
        "tokenflow-b-enhanced": TOKENFLOW,
        "tokenflow-b-256": TOKENFLOW,
        "tokenflow-l": replace(TOKENFLOW, optimizer=HALF),
        "tokenflow-xl": replace(TOKENFLOW, optimizer=HALF),
        "unitok-l": UNITOK,
        "unitok-b": UNITOK,
        "var-vqvae": VQVAE,
    }.items()
}
