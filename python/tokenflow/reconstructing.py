"""`tokenflow reconstruct`: what a tokenizer makes of pictures, beside them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm

from tokenflow.data.entries import Entry, data_set
from tokenflow.encoding import Running, batches
from tokenflow.evaluation.reconstruction import psnr
from tokenflow.files import printable
from tokenflow.models import Tokenizer
from tokenflow.report.pixels import pil_image

FEW = 100
"""Pictures up to which each has a line of its own."""


def reconstruct(model: Tokenizer, paths: Sequence[Path], out: Path, running: Running) -> None:
    """Write original and reconstruction of every picture side by side, and print PSNR and token count.

    Args:
        model: any tokenizer.
        paths: image files, folders, tar shards.
        out: folder for the results, one PNG a picture, in the sub-folders that the pictures lie in.
        running: batch, type, device.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no readable picture, or two results or a picture and a result would be one file.
    """
    entries = [entry for path in paths for entry in _entries(path, out)]
    if not entries:
        raise ValueError(f"reconstruct: pictures: wanted at least one, got none in {', '.join(map(str, paths))}")
    places = dict(zip(entries, targets(entries, out), strict=True))
    qualities = []
    for batch, images in batches(running.place(model), entries, running, "reconstructing"):
        indices = model.encode(images)
        decoded = model.decode(indices)
        for entry, original, image, quality in zip(batch, images, decoded, psnr(decoded, images).tolist(), strict=True):
            target = places[entry]
            target.parent.mkdir(parents=True, exist_ok=True)
            pil_image(torch.cat([original, image], dim=2)).save(target)
            qualities.append(quality)
            if len(entries) <= FEW:
                tqdm.write(f"{target}: {indices.shape[-1]} tokens, {quality:.2f} dB")
    if len(entries) > 1:
        mean = sum(qualities) / len(qualities)
        print(f"{len(qualities)} pictures in {out}: {indices.shape[-1]} tokens each, {mean:.2f} dB on average")


def targets(entries: Sequence[Entry], out: Path) -> list[Path]:
    """Where each result goes: as the picture lies in its data set, ending in .png; a.png.png and a.jpg.png of a.png and a.jpg.

    Raises:
        ValueError: two results, or a picture and a result, would be one file.
    """
    # Members of a tar file may be called anything: ../../a.png, or /a.png.
    keys = [PurePosixPath(PurePosixPath(e.key).name if e.key == printable(e.path) else e.key) for e in entries]
    names = [Path(*(part for part in key.parts if part not in ("/", "//", ".."))) for key in keys]
    plain = [name.with_suffix(".png") for name in names]
    shared = Counter(plain)
    found = [out / (name if shared[name] == 1 else f"{full}.png") for name, full in zip(plain, names, strict=True)]
    taken = {Path(entry.path).resolve(): entry for entry in entries}
    for entry, target in zip(entries, found, strict=True):
        place = target.resolve()
        if place in taken:
            raise ValueError(
                f"reconstruct: out: wanted a file of its own for {entry.path}, got {target}, which is that of {taken[place].path}"
            )
        taken[place] = entry
    return found


def _entries(path: Path, out: Path) -> list[Entry]:
    """The pictures of a path, but those that an earlier call wrote."""
    if not (path.is_dir() or path.suffix == ".tar"):
        return [Entry.of(path)]
    results = out.resolve()
    if path.resolve() == results:
        raise ValueError(f"reconstruct: out: wanted another folder than that of the pictures, got {out}")
    entries, broken = data_set(path)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    kept = [entry for entry in entries if results not in Path(entry.path).resolve().parents]
    if len(kept) < len(entries):
        print(f"{len(entries) - len(kept)} pictures in {out}, where the results go, are left out", file=sys.stderr)
    return kept
