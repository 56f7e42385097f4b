"""Models of a few channels, TokenFlow's with each kind of tower and UniTok, and images for them."""

from dataclasses import replace

import torch
from tokenflow.models import VQVAE, TokenFlow, UniTok, unitok, vqvae
from tokenflow.models.semantic import Tower
from tokenflow.models.tokenflow import Config

SIZES = {"semantic_dim": 6, "pixel_dim": 2, "codebook_size": 64, "pixel_weight": 1.0, "update": "gradient",
         "dead_code_threshold": 0.0, "latent": 8, "teacher_dim": 10, "decoder_depth": 1, "decoder_heads": 2,
         "widths": (8, 8, 16), "decoder_widths": (8, 8, 16), "decoder_grid": 4}  # fmt: skip
CLIP = Config(image_size=16, scales=(1, 2, 4), **SIZES,
              tower=Tower("clip", width=24, depth=2, heads=3, hidden=40, patch=4, grid=4))  # fmt: skip
SIGLIP = Config(image_size=23, scales=(1, 2, 3, 4), **SIZES,
                tower=Tower("siglip", width=24, depth=2, heads=3, hidden=40, patch=5, grid=4))  # fmt: skip
VITAMIN = Config(image_size=64, scales=(1, 2, 4), **{**SIZES, "widths": (8, 8, 8, 8, 16), "decoder_widths": (8, 8, 8, 8, 16)},
                 tower=Tower("vitamin", width=24, depth=2, heads=3, hidden=48, patch=16, grid=4, stages=(8, 16)))  # fmt: skip
CONFIGS = {"clip": CLIP, "siglip": SIGLIP, "vitamin": VITAMIN}


def small(config):
    torch.manual_seed(0)
    return TokenFlow(config).eval()


def images_of(model, batch=2):
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1


UNITOK = unitok.Config(
    image_size=64, widths=(4, 8), dim=16, depth=2, heads=2, groups=4, codebook_size=32, code_dim=8, projection_heads=2,
    embed_dim=12, text_width=16, text_heads=2, text_depth=1, context=9, vocabulary=40, drop_path=0.0,
)  # fmt: skip


def small_unitok(seed: int = 0, **changes) -> UniTok:
    torch.manual_seed(seed)
    return UniTok(replace(UNITOK, **changes)).eval()


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def one_of_each() -> dict:
    """A tokenizer of every kind in eval mode, by its kind, of three sizes of pictures."""
    torch.manual_seed(0)
    return {
        "tokenflow": TokenFlow.from_preset("tokenflow-tiny").eval(),
        "vqvae": VQVAE(vqvae.Config(image_size=(32, 48), scales=((1, 1), (2, 3), (4, 6)), dim=4, codebook_size=16, widths=(8, 8, 8, 16))).eval(),
        "unitok": UniTok(unitok.Config(
            image_size=(64, 32), widths=(4, 8), dim=16, depth=1, heads=2, groups=2, codebook_size=32, code_dim=8,
            projection_heads=2, embed_dim=12, text_width=16, text_heads=2, text_depth=1, context=9, vocabulary=40,
        )).eval(),
    }  # fmt: skip
