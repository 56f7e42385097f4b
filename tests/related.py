"""What the tests of the related papers' quantizers share: one small module of each kind, all of 8 channels."""

import torch
from harness import normal

from tokenflow_ext.quantize import (
    AttentionQuantizer,
    IndexPropagationQuantizer,
    PrefixMultiScaleQuantizer,
    ProductQuantizer,
    ProjectedQuantizer,
    ResidualQuantizer,
    SharedIndexQuantizer,
    SignQuantizer,
    SoftMultiScaleQuantizer,
    VectorQuantizer,
)

FLAT = {
    "ibq": lambda **k: IndexPropagationQuantizer(8, 40, **k),
    "attention": lambda **k: AttentionQuantizer(8, 40, key_dim=6, norm="layer", **k),
    "projected": lambda **k: ProjectedQuantizer(normal(60, 12, seed=3), 8, window=(10, 50), **k),
    "residual": lambda **k: ResidualQuantizer(8, 40, 3, **k),
    "residual_shared": lambda **k: ResidualQuantizer(8, 40, 3, shared=True, **k),
    "product": lambda **k: ProductQuantizer([VectorQuantizer(4, 40, **k), VectorQuantizer(4, 30, **k)]),
    "product_residual": lambda **k: ProductQuantizer([ResidualQuantizer(4, 40, 2, **k) for _ in range(2)]),
    "sign": lambda **k: SignQuantizer(8, **k),
    "spherical": lambda **k: SignQuantizer(8, spherical=True, **k),
    "rotation": lambda **k: VectorQuantizer(8, 40, groups=2, gradient="rotation", **k),
    "rotation_shared": lambda **k: SharedIndexQuantizer((5, 3), 40, metric="l2", gradient="rotation", **k),
    "sphere_mean": lambda **k: VectorQuantizer(8, 40, update="ema", normalize_mean=True, **k),
}
"""Rows [..., 8]; with channel_dim=1, [B, 8, H, W]."""

SCALES = (1, 2, (2, 3), 4)
MAPS = {
    "soft_multiscale": lambda **k: SoftMultiScaleQuantizer(AttentionQuantizer(8, 40, **k), SCALES),
    "soft_multiscale_ibq": lambda **k: SoftMultiScaleQuantizer(IndexPropagationQuantizer(8, 40, **k), SCALES),
    "prefix": lambda **k: PrefixMultiScaleQuantizer(
        VectorQuantizer(8, 40, **k), SCALES, dropped=0.6, normalize_codes=False
    ),
    "product_prefix": lambda **k: ProductQuantizer(
        [PrefixMultiScaleQuantizer(VectorQuantizer(4, 40, **k), SCALES, dropped=0.6) for _ in range(2)]
    ),
}
"""Maps [B, 8, 4, 4]."""

KINDS = {**FLAT, **MAPS}


def build(kind: str, **options):
    """A module of that kind, the same whenever it is built; IBQ's and CODA's codes in reach of standard normals."""
    torch.manual_seed(5)
    return KINDS[kind](backend="native", **options)


def features(kind: str, batch: int = 6, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normals that fit the kind."""
    return (
        normal(batch, 8, 4, 4, seed=seed, dtype=dtype) if kind in MAPS else normal(batch, 7, 8, seed=seed, dtype=dtype)
    )
