"""Inputs of the multi-scale tests: options that cover every branch, and the surrogate whose ids and sg values are constants."""

import torch
from harness import near_ties, normal

from tokenflow_ext import ops
from tokenflow_ext._scales import grids
from tokenflow_ext.reference.multiscale import split_rows
from tokenflow_ext.reference.quantize import searched
from tokenflow_ext.reference.resample import resample

SCALES = {
    "square": ((5, 5), [1, 2, 3, 5]),
    "oblong": ((4, 7), [(1, 1), (2, 3), (4, 7)]),
    "any order, repeated, short of the map": ((6, 5), [3, (1, 4), 3, 2]),
    "one scale": ((4, 4), [4]),
    "one pixel": ((1, 1), [1, 1]),
}
"""Map sizes and the grids on them."""

MODES = {
    "cosine": {},
    "weighted cosine": {"weights": [1.0, 4.0]},
    "l2": {"metric": "l2"},
    "dot": {"metric": "dot"},
    "raw codes": {"normalize_codes": False},
    "accumulated": {"loss_on": "accumulated", "metric": "l2"},
    "accumulated cosine": {"loss_on": "accumulated"},
    "phi": {"loss_on": "accumulated", "metric": "l2", "phi": True},
    "phi, raw codes": {"loss_on": "accumulated", "normalize_codes": False, "phi": True},
}
"""Options of the loop; phi stands for one made by `phi_of`."""

WIDTHS = (5, 3)


def phi_of(scales, dtype=torch.float32, seed=9):
    """(weight [P, C, C, 3, 3], bias [P, C], ratio, assignment) with P = 2 rows in turn."""
    channels = sum(WIDTHS)
    weight = 0.1 * normal(2, channels, channels, 3, 3, seed=seed, dtype=dtype)
    return weight, 0.1 * normal(2, channels, seed=seed + 1, dtype=dtype), 0.5, [s % 2 for s in range(len(scales))]


def case(grid: str, mode: str, dtype=torch.float32, batch: int = 3, codes: int = 37):
    """features, codebooks and options of one grid and one mode."""
    size, scales = SCALES[grid]
    options = {"scales": scales, **MODES[mode]}
    if options.pop("phi", False):
        options["phi"] = phi_of(scales, dtype)
    features = normal(batch, sum(WIDTHS), *size, seed=1, dtype=dtype)
    return features, [normal(codes, w, seed=2 + w, dtype=dtype) for w in WIDTHS], options


def decoding(options: dict, size) -> dict:
    """The options of `multiscale_decode` among those of the loop."""
    kept = {k: v for k, v in options.items() if k in ("scales", "metric", "phi", "normalize_codes")}
    return {**kept, "size": size}


def followed(features, codebooks, ids, options) -> int:
    """Near-ties of ids [B, L] against the float64 search on the rows that these very ids leave; other differences fail."""
    rows = ops.multiscale_rows(features, ids, codebooks, **options, backend="native")
    parts = [p.double() for p in rows.split([c.shape[1] for c in codebooks], dim=-1)]
    metric, weights = options.get("metric", "cosine"), options.get("weights")
    exact = ops.shared_nearest_code(
        parts, [c.double() for c in codebooks], metric=metric, weights=weights, backend="reference"
    )
    return near_ties(ids, exact, rows.split([c.shape[1] for c in codebooks], dim=-1), codebooks, metric, weights)


def frozen_multiscale(features, codebooks, ids, options, commitment_weight=0.25, codebook_weight=1.0, at=None):
    """The surrogate of multiscale_quantize on codes: ids and every stop-gradient value are constants taken at `at`."""
    metric = options.get("metric", "cosine")
    sizes, size = grids("multiscale", options["scales"]), tuple(features.shape[2:])
    widths = [c.shape[1] for c in codebooks]
    unit = options.get("normalize_codes", metric == "cosine")
    constants = at or (features.detach(), [c.detach() for c in codebooks])

    def codes_of(tables, index):
        table = torch.cat(tables, -1)
        return (searched(table, widths, "cosine") if unit else table)[index]

    quantized, loss = 0.0, 0.0
    x, residual = features.movedim(1, -1), constants[0].movedim(1, -1)
    taken = torch.zeros_like(residual)
    for grid, index in zip(sizes, split_rows(ids, sizes)):
        y0 = searched(resample(residual, grid, "area").flatten(1, 2), widths, metric)
        y = searched(resample(x - taken, grid, "area").flatten(1, 2), widths, metric)
        q0, q = codes_of(constants[1], index), codes_of(codebooks, index)
        loss = loss + codebook_weight * (q - y0).square().mean() + commitment_weight * (q0 - y).square().mean()
        quantized = quantized + resample((q0 + (y - y0)).unflatten(1, grid), size, "bicubic")
        step = resample(q0.unflatten(1, grid), size, "bicubic")
        residual, taken = residual - step, taken + step
    return quantized.movedim(-1, 1), loss / len(sizes)
