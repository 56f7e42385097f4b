"""Golden values: numbers that the published implementations produced, and the rule that makes their unstored inputs.

Each fixture `golden/NAME.safetensors` has a manifest `golden/NAME.json` with the options, tensors, scalars and
tolerances of its cases. A tensor that is not stored is a pure function of (salt, name, shape), given below.
"""

import json
import math
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@cache
def manifest(fixture: str) -> dict:
    """The manifest of a fixture."""
    return json.loads((FOLDER / f"{fixture}.json").read_text())


@cache
def _stored(fixture: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{fixture}.safetensors")


def case_names(fixture: str) -> list[str]:
    """Names of a fixture's cases."""
    return list(manifest(fixture)["cases"])


class Case:
    """One case: `case["h"]` is a tensor, stored or generated; options, scalars and limits are attributes."""

    def __init__(self, fixture: str, name: str):
        entry = manifest(fixture)["cases"][name]
        self.fixture, self.name = fixture, name
        self.options, self.scalars = entry["options"], entry["scalars"]
        self._tensors, self._generated = entry["tensors"], entry.get("generated") or {}
        self._tolerance = entry["tolerance"]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._generated

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return _stored(self.fixture)[self._tensors[name]["tensor"]].clone()
        made = self._generated[name]
        array = {"normals": normals}[made["function"]](made["name"], made["shape"], made["salt"])
        return torch.from_numpy(array * np.float32(made.get("scale", 1.0)))

    def limit(self, kind: str, expected: Tensor | None = None) -> float:
        """The manifest's tolerance: an absolute error, plus a share of max|expected| where it names two numbers."""
        absolute, *relative = [float(n) for n in re.findall(r"\d+e-\d+", self._tolerance[kind])]
        return absolute + (relative[0] * float(expected.abs().max()) if relative else 0.0)

    def check(self, kind: str, actual: Tensor, expected: Tensor) -> None:
        """Asserts that the largest absolute error is under the manifest's tolerance of that kind."""
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        error = float((actual - expected).detach().abs().max())
        assert error <= self.limit(kind, expected), f"{self.name}: {kind} error {error:.3g}"

    def check_indices(self, actual: Tensor) -> int:
        """Asserts equal codes except at near-ties, where the stored float64 gap is under the limit; counts those."""
        differ = actual != self["idx"]
        certified = self["gap"] < self.limit("index")
        wrong = int((differ & ~certified).sum())
        assert wrong == 0, f"{self.name}: {wrong} of {differ.numel()} codes differ without a near-tie"
        near_ties = int((differ & certified).sum())
        print(f"{self.fixture}/{self.name}: {differ.numel()} codes, {near_ties} certified near-ties")
        return near_ties


def generator(name: str, salt: int) -> np.random.Generator:
    """The random stream of a name: Philox keyed by (salt, crc32 of the name)."""
    return np.random.Generator(np.random.Philox(key=np.array([salt, zlib.crc32(name.encode())], dtype=np.uint64)))


def normals(name: str, shape: list[int], salt: int) -> np.ndarray:
    """float32 standard normals."""
    return generator(name, salt).standard_normal(tuple(shape), dtype=np.float32)


def integers(name: str, shape: list[int], salt: int, low: int, high: int) -> np.ndarray:
    """int64, uniform in [low, high)."""
    return generator(name, salt).integers(low, high, size=tuple(shape), dtype=np.int64)


def _blocks(array: np.ndarray, cell: int, height: int, width: int) -> np.ndarray:
    return np.repeat(np.repeat(array, cell, axis=2), cell, axis=3)[:, :, :height, :width]


def image(name: str, shape: list[int], salt: int) -> np.ndarray:
    """float32 [B, 3, H, W] in [-1, 1] with energy in cells of 32, 8 and 1 pixels."""
    batch, _, height, width = shape
    x = np.zeros((batch, 3, height, width), np.float32)
    for cell, gain in ((32, 0.5), (8, 0.3), (1, 0.15)):
        coarse = normals(f"{name}/{cell}", [batch, 3, -(-height // cell), -(-width // cell)], salt)
        x = x + np.float32(gain) * _blocks(coarse, cell, height, width)
    return np.clip(x, -1.0, 1.0)


def features(name: str, shape: list[int], salt: int) -> np.ndarray:
    """float32 [B, C, H, W]: normals plus twice a normal map repeated over 4 x 4 blocks."""
    b, c, h, w = shape
    low = normals(name + "/low", [b, c, -(-h // 4), -(-w // 4)], salt)
    return normals(name + "/fine", shape, salt) + np.float32(2.0) * _blocks(low, 4, h, w)


_ZEROS = ("codebook_used", "vocab_usage", "ema_vocab_hit_SV", "zero_k_bias")
_CODEBOOKS = ("embedding_vqkd.weight", "embedding_vqgan.weight", "codebook.weight")
_LOOKUPS = (
    "embed_tokens.weight",
    "token_embedding.weight",
    "class_emb.weight",
    "lvl_embed.weight",
    "pos_1LC",
    "pos_start",
)
_POSITIONS = ("positional_embedding", "pos_embed", "position_embedding.weight", "cls_token", "probe")


def value(key: str, shape: list[int], salt: int) -> np.ndarray:
    """float32 value of one state-dict entry; the first rule that matches the key wins."""
    if key.endswith(_ZEROS) or (key.endswith("encoder.pos_embed") and shape[1] == 1):
        return np.zeros(tuple(shape), np.float32)
    if key.endswith("logit_scale"):
        return np.full(tuple(shape), math.log(1 / 0.07), np.float32)
    n = normals(key, shape, salt)
    if key.endswith("scale_mul_1H11"):
        return np.float32(math.log(4.0)) + np.float32(0.02) * n
    if key.endswith(_CODEBOOKS):
        return n
    if key.endswith("quantize.embedding.weight"):
        return np.float32(0.25) * n
    if key.endswith(_LOOKUPS):
        return np.float32(0.5) * n
    if key.endswith(_POSITIONS):
        return np.float32(0.1) * n
    if len(shape) <= 1:
        return np.float32(1.0) + np.float32(0.02) * n if key.endswith(".weight") else np.float32(0.02) * n
    fan = shape[0] if key.endswith("text_projection") else math.prod(shape[1:])
    return n * np.float32(fan**-0.5)


def published_shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of a published model."""
    table = json.loads((FOLDER / "state_dict_keys" / f"{name}.json").read_text())
    return {key: entry["shape"] for key, entry in table["tensors"].items()}
