"""Tokens of a data set in safetensors shards.

    out/encode.json              what was encoded, by which model, how
    out/tokens-00012.safetensors "indices" int32 [n, L] or [n, G, L] of the pictures 12 S .. 13 S - 1, broken ones left out

Which pictures a shard holds depends on the data set and on S alone, not on how many processes wrote shards or how often they
were stopped. A shard is whole or absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tokenflow.files import write_whole

MANIFEST = "encode.json"
ABOUT = "tokenflow"


@dataclass(frozen=True)
class Shard:
    """Tokens of n pictures.

    Attributes:
        indices: int64 [n, L] or [n, G, L], as the tokenizer's `decode` takes them.
        keys: names of the pictures in their data set.
        groups: their classes, "" where unknown.
        captions: their texts, "" where none came with them.
        skipped: a sentence about each picture of the shard that could not be read.
    """

    indices: Tensor
    keys: list[str]
    groups: list[str]
    captions: list[str]
    skipped: list[str]


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"tokens-{number:05d}.safetensors"


def write_shard(shard: Shard, path: Path, shapes: list[list[int]]) -> None:
    """Write a shard; `shapes` are those of the maps that a row of ids is split into, [h, w] a scale or [L] a codebook."""
    about = {**asdict(shard), "shapes": shapes}
    del about["indices"]
    # One entry, because safetensors keeps several in no order and equal shards are to be equal files.
    text = json.dumps(about, sort_keys=True, ensure_ascii=False)
    write_whole(path, safetensors.torch.save({"indices": shard.indices.int().contiguous()}, {ABOUT: text}))


def about_shard(path: Path) -> dict[str, Any]:
    """Everything of a shard but the ids: keys, groups, captions, skipped, shapes.

    Raises:
        ValueError: the file is broken, or no shard.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[ABOUT])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"tokens: wanted a shard that tokenflow encode wrote, got {path} ({error}): without it, the same command writes it again"
        ) from error


def start(folder: Path, manifest: dict[str, Any], rank: int = 0) -> None:
    """Make the folder for shards, or see that it is that of the same run; every rank does so, in any order.

    Raises:
        ValueError: it holds tokens of other pictures or of another model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.exists():
        write_whole(path, json.dumps(manifest, indent=2) + "\n", writer=f".{rank}")
    before = _manifest(path)
    other = [name for name in manifest if manifest[name] != before.get(name)]
    if other:
        changes = ", ".join(f"{name} {manifest[name]} instead of {before.get(name)}" for name in other)
        raise ValueError(f"encode: out: wanted a new folder or that of the same run, got {folder} with {changes}")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokens: wanted the {MANIFEST} of tokenflow encode, got {path} ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"tokens: wanted the {MANIFEST} of tokenflow encode, got {path} with other things in it")
    return found


def read_tokens(folder: str | Path) -> Iterator[Shard]:
    """The shards of a finished `tokenflow encode`, one after the other.

    Raises:
        FileNotFoundError: the folder holds no tokens, or shards are missing because the run has not ended.
        ValueError: its encode.json is another file.

    Example:
        for shard in read_tokens("runs/tokens"):
            images = model.decode(shard.indices)
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"read_tokens: folder: wanted one that tokenflow encode wrote, got {folder} without {MANIFEST}"
        )
    shards = _manifest(folder / MANIFEST).get("shards")
    if type(shards) is not int:
        raise ValueError(
            f"tokens: wanted the {MANIFEST} of tokenflow encode, got that of {folder} without a number of shards"
        )
    paths = [shard_path(folder, number) for number in range(shards)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"read_tokens: folder: wanted all {len(paths)} shards, got {folder} without {len(missing)} of them, "
            f"the first {missing[0]}: the same tokenflow encode goes on where it was stopped"
        )
    return _shards(paths)


def _shards(paths: list[Path]) -> Iterator[Shard]:
    for path in paths:
        about = about_shard(path)
        del about["shapes"]
        yield Shard(safetensors.torch.load_file(path)["indices"].to(torch.int64), **about)
