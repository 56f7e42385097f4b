"""`tokenflow encode` of a data set: every process writes the shards that are its own and not there yet."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tokenflow.data.entries import Entry, data_set
from tokenflow.data.loading import Crop, as_float, loaded
from tokenflow.data.pictures import skipped_sentence
from tokenflow.data.tokens import Shard, about_shard, shard_path, start, write_shard
from tokenflow.models import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Running:
    """How a model is run over a data set.

    Attributes:
        batch: pictures at once.
        workers: processes that decode pictures.
        dtype: "float32", or "bfloat16" networks around a float32 quantizer.
        device: where the model is; None takes the rank's GPU where there is one.
        resize: see `Crop`.
    """

    batch: int = 32
    workers: int = 0
    dtype: str = "float32"
    device: str | None = None
    resize: str = "area"

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: wanted at least {least}, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: wanted one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def place(self, model: Tokenizer) -> Tokenizer:
        """The model on its device, in its type.

        Raises:
            ValueError: no such device.
        """
        device = self.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
        try:
            return model.to(device=device, dtype=DTYPES[self.dtype]).eval()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: wanted one that this machine has, got {device} ({reason})") from error

    def images(self, model: Tokenizer, images: Tensor) -> Tensor:
        """uint8 images as the model takes them."""
        return as_float(images.to(next(model.parameters()).device))


def batches(
    model: Tokenizer, entries: Sequence[Entry], running: Running, what: str
) -> Iterator[tuple[list[Entry], Tensor]]:
    """The readable pictures and their images [n, 3, H, W] in [-1, 1], batch by batch under a progress bar; the others are named
    on standard error at the end.

    Raises:
        ValueError: none is readable.
    """
    chunks, broken, crop = _chunks(range(len(entries)), running.batch), [], Crop.of(model, running.resize)
    print(f"{what}: {crop}", file=sys.stderr)
    with tqdm(total=len(entries), desc=what, unit="picture") as bar:
        for chunk, batch in zip(chunks, loaded(entries, chunks, crop, workers=running.workers), strict=True):
            broken += batch.broken
            if batch.rows:
                yield [entries[row] for row in batch.rows], running.images(model, batch.images)
            bar.update(len(chunk))
    if broken:
        print(skipped_sentence(broken), file=sys.stderr)
    if len(broken) == len(entries):
        raise ValueError(f"{what}: wanted at least one readable picture, got none")


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says.

    Raises:
        ValueError: the environment contradicts itself.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not 0 <= rank < world:
        raise ValueError(f"RANK: wanted 0 to {world - 1}, for a WORLD_SIZE of {world}, got {rank}")
    return rank, world


def digest(model: Tokenizer) -> str:
    """Sixteen hex digits that name the configuration and the weights."""
    total = hashlib.sha256(json.dumps([model.kind, asdict(model.config)]).encode())
    for name, value in model.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def encode_data_set(model: Tokenizer, data: Path, out: Path, running: Running, *, shard_size: int = 1024) -> None:
    """Write the shards of `tokenflow.data.tokens` into `out`; started again, it goes on behind the last whole shard.

    Under torchrun, rank r of R writes the shards r, r + R, ... and nobody waits for anybody.

    Raises:
        FileNotFoundError: no such data.
        ValueError: no readable picture, or `out` belongs to another run.
    """
    if shard_size < 1:
        raise ValueError(f"encode: shard_size: wanted at least 1, got {shard_size}")
    rank, world = ranks()
    entries, broken = data_set(data)
    if not entries:
        reason = f" ({broken[0]})" if broken else ""
        raise ValueError(f"encode: data: wanted at least one picture, got none in {data}{reason}")
    crop = Crop.of(model, running.resize)
    shards = -(-len(entries) // shard_size)
    names = hashlib.sha256("\n".join(entry.key for entry in entries).encode()).hexdigest()[:16]
    start(out, {
        "pictures": len(entries), "names": names, "model": digest(model), "dtype": running.dtype, "crop": str(crop),
        "batch": running.batch, "shard size": shard_size, "shards": shards,
    }, rank)  # fmt: skip
    own = range(rank, shards, world)
    todo = [number for number in own if not shard_path(out, number).exists()]
    _write(running.place(model), entries, out, running, todo, shard_size, crop, own)

    found = [about_shard(shard_path(out, number)) for number in own]
    read, skipped = sum(len(f["keys"]) for f in found), [s for f in found for s in f["skipped"]]
    skipped += broken if rank == 0 else []
    if skipped:
        print(skipped_sentence(skipped), file=sys.stderr)
    if world == 1 and not read:
        raise ValueError(f"encode: data: wanted at least one readable picture, got none in {data}")
    who = f"rank {rank} of {world}: " if world > 1 else ""
    print(f"{who}tokens of {read} pictures in {len(found)} shard{'s' * (len(found) != 1)} of {out}; {crop}")


def _write(
    model: Tokenizer, entries: list[Entry], out: Path, running: Running, todo: list[int], size: int, crop: Crop, own: range
) -> None:  # fmt: skip
    rows = {number: range(number * size, min(len(entries), (number + 1) * size)) for number in own}
    batches = [(number, chunk) for number in todo for chunk in _chunks(rows[number], running.batch)]
    total, left = sum(map(len, rows.values())), sum(len(rows[number]) for number in todo)
    parts: list[tuple[list[int], Tensor, list[str]]] = []
    begun = time.perf_counter()
    with tqdm(total=total, initial=total - left, desc="encoding", unit="picture", disable=bool(own.start)) as bar:
        pictures = loaded(entries, [chunk for _, chunk in batches], crop, workers=running.workers)
        for (number, chunk), batch in zip(batches, pictures, strict=True):
            indices = model.encode(running.images(model, batch.images)).cpu()
            parts.append((batch.rows, indices, batch.broken))
            if chunk[-1] == rows[number][-1]:
                _finish(model, entries, parts, shard_path(out, number))
                parts = []
            bar.update(len(chunk))
    if left and not own.start:
        tqdm.write(f"{left / (time.perf_counter() - begun):.1f} pictures/s", file=sys.stderr)


def _finish(
    model: Tokenizer, entries: list[Entry], parts: list[tuple[list[int], Tensor, list[str]]], path: Path
) -> None:
    indices = torch.cat([ids for _, ids, _ in parts])
    read = [entries[row] for rows, _, _ in parts for row in rows]
    keys, groups, captions = ([getattr(e, name) for e in read] for name in ("key", "group", "caption"))
    shapes = [list(part.shape[1:]) for part in model.split(indices)]
    write_shard(Shard(indices, keys, groups, captions, [s for _, _, broken in parts for s in broken]), path, shapes)


def _chunks(rows: range, batch: int) -> list[range]:
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]
