"""Files with every name of the authors' and small tensors, for tests that need a whole model and no golden values."""

import json

import golden_values as golden
import torch

TABLES = golden.FOLDER / "state_dict_keys"

SMALL = {
    "var_vqvae": {160: 8, 320: 16, 640: 32, 1920: 96, 4096: 64, 32: 4},
    "tokenflow_b": {
        768: 24, 2304: 72, 3072: 96, 197: 5, 128: 8, 256: 16, 512: 32, 32: 6, 8: 2, 32768: 64, 131072: 64,
    },
    "tokenflow_l": {
        1152: 48, 3456: 144, 2304: 96, 4608: 192, 257: 5, 192: 12, 384: 24, 768: 48, 1536: 96, 128: 8, 256: 16, 512: 32,
        32: 6, 8: 2, 32768: 64, 131072: 64,
    },
    "tokenflow_xl": {
        1152: 48, 3456: 144, 4304: 40, 4608: 192, 729: 4, 730: 5, 14: 4, 128: 8, 256: 16, 512: 32, 32: 6, 8: 2,
        32768: 64, 131072: 64,
    },
}  # fmt: skip
"""Size in the published model -> size here."""


def shapes(name: str) -> dict[str, list[int]]:
    """Name -> shape of a published model's file."""
    return {key: entry["shape"] for key, entry in json.loads((TABLES / f"{name}.json").read_text())["tensors"].items()}


def small_file(name: str, salt: int = 1) -> dict[str, torch.Tensor]:
    """A released state dict of a published model made small."""
    smaller = SMALL[name]
    small = {key: [smaller.get(n, n) for n in shape] for key, shape in shapes(name).items()}
    return {key: torch.from_numpy(golden.value(key, shape, salt)) for key, shape in small.items()}
