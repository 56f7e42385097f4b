"""What an op must move and compute, on shapes of the models, and the least time that takes: formulas of csrc/cuda/*.cu.

Beside it what the PyTorch expression of the same moves: every operation of it reads its operands and writes its result once.
"""

from collections.abc import Callable
from dataclasses import dataclass

DEVICES = {"A100": (2.0e12, 19.5e12), "H100": (3.35e12, 67e12)}
"""Bytes a second of memory, float32 operations a second outside of tensor cores."""
SCALES = {  # grids of TokenFlow, up to 16 x 16: numbers of one channel in all scales L, and without the last's R
    "TokenFlow": dict(B=32, C=40, S=9, L=817, R=816, H=16),
}


@dataclass(frozen=True)
class Floor:
    """One op on one shape."""

    op: str
    file: str  # whose header has the formula
    stated: str  # there, of this shape
    shape: dict[str, int]
    moved: Callable
    operations: Callable
    pytorch: Callable

    @property
    def bytes(self) -> float:
        return self.moved(**self.shape)

    @property
    def computed(self) -> float:
        return self.operations(**self.shape)

    @property
    def torch_bytes(self) -> float:
        return self.pytorch(**self.shape)

    def microseconds(self, device: str) -> float:
        bandwidth, peak = DEVICES[device]
        return 1e6 * max(self.bytes / bandwidth, self.computed / peak)


def _sums(N, K, C, passes=2):
    """Of sums.cuh, float32."""
    return N * (24 * passes - 4) + N * (8 + 4 * C) + 4 * C * K


def _images(per_image):
    return lambda B, C, S, L, R, H: B * per_image(C=C, S=S, L=L, R=R, map=C * H * H)


ROWS = dict(N=262144, K=32768, C=32)
FLOORS = [
    Floor(
        *("nearest_code, packed", "search.cu", "21.5"),
        dict(N=16384, K=32768, C=40),
        lambda N, K, C: 4 * N * C + 4 * K * (C + 1) + 16 * N,
        lambda N, K, C: 2 * N * K * C,
        lambda N, K, C: 4 * N * C + 4 * K * C + 8 * N * K + 8 * N,  # scores written, then read
    ),
    Floor(
        *("packing of codes", "search_pack.cu", "11 MB"),
        dict(K=32768, C=40),
        lambda K, C: 4 * K * C + 4 * K * (C + 1),
        lambda K, C: 3 * K * C,
        lambda K, C: 12 * K * C + 16 * K,  # norm, clamp, division
    ),
    Floor(
        *("quantize, after the search", "quantize.cu", "106 MB"),
        ROWS,
        lambda N, K, C: N * (8 * C + 16 + 4 * (C + 1)),
        lambda N, K, C: 12 * N * C,
        lambda N, K, C: N * (8 + 8 * C + 24 * C + 32 + 24 * C + 24 * C),  # gather, two norms, straight-through, loss
    ),
    Floor(
        *("quantize_backward", "quantize_backward.cu", "202 MB"),
        ROWS,
        lambda N, K, C: N * (20 * C + 32 + 44) + 16 * K * C,
        lambda N, K, C: 20 * N * C,
        lambda N, K, C: N * (32 * C + 12 * C + 48 * C + 12 * C + 8) + 52 * K * C,  # losses, sum, norms, index_add_
    ),
    Floor(
        *("normalize_rows", "normalize_rows.cu", "16.8"),
        dict(N=65536, C=32),
        lambda N, C: 8 * N * C,
        lambda N, C: 3 * N * C,
        lambda N, C: N * (12 * C + 16),
    ),
    Floor(
        *("normalize_rows_backward", "normalize_rows.cu", "25.2 MB"),
        dict(N=65536, C=32),
        lambda N, C: 12 * N * C,
        lambda N, C: 7 * N * C,
        lambda N, C: 48 * N * C,
    ),
    Floor(
        *("code_statistics", "code_statistics.cu", "87 MB"),
        ROWS,
        lambda N, K, C: N * (12 + 4 * C) + _sums(N, K, C),
        lambda N, K, C: 2 * N * C,
        lambda N, K, C: N * (16 + 17 * C) + 4 * K * (C + 1),  # isfinite, bincount, index_add_ of float32 by atomics
    ),
    Floor(
        *("ema_update", "ema_update.cu", "22 MB"),
        dict(K=32768, C=32),
        lambda K, C: 20 * K * (C + 1),
        lambda K, C: 6 * K * C,
        lambda K, C: K * (44 * C + 52),  # two lerp_, smoothing, division, norm, where
    ),
    Floor(
        *("lookup", "lookup.cu", "69 MB"),
        dict(N=262144, C=32),
        lambda N, C: N * (8 + 8 * C),
        lambda N, C: 0,
        lambda N, C: N * (8 + 8 * C),
    ),
    Floor(
        *("multiscale_decode", "multiscale_decode.cu", "14 MB"),
        SCALES["TokenFlow"],
        _images(lambda C, S, L, R, map: L * (8 + 12 * C + 8) + 4 * map),
        lambda **_: 36e6,
        _images(lambda C, S, L, R, map: L * (8 + 12 * C) + 16 * S * map),  # gather, interpolate, add, a scale
    ),
    Floor(
        *("multiscale_inputs, chain", "multiscale_chain.cu", "17 MB"),
        SCALES["TokenFlow"],
        _images(lambda C, S, L, R, map: L * (8 + 12 * C + 8) + 4 * C * R),
        lambda **_: 15e6,
        _images(lambda C, S, L, R, map: L * (8 + 28 * C)),
    ),
    Floor(
        *("multiscale_quantize, backward", "multiscale_quantize_backward.cu", "28 MB"),
        SCALES["TokenFlow"],
        _images(lambda C, S, L, R, map: 24 * C * L + 8 * map),
        lambda **_: 71e6,
        _images(lambda C, S, L, R, map: 96 * C * L + 20 * S * map),
    ),
]
