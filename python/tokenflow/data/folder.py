"""Any folder of images as a picture set in memory; captions come with the pictures or from the file names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from tokenflow.data.entries import Entry, data_set
from tokenflow.data.pictures import Pictures, read_picture, split_by_base

FEWEST = 32
FEWEST_CAPTIONS = 10


def image_folder(path: Path, *, fewest: int = FEWEST, without: Path | None = None) -> Pictures:
    """Read every image below `path` (or in its tar shards, see `data_set`), broken ones left out and named in `skipped`.

    A picture without a caption is captioned by its file name ("red_apple-03.png" -> "red apple"). Pictures of one caption
    share a base and are held out together, see `bases_of`. If the pictures lie in sub-folders, the first folder's name is
    their group.

    Args:
        path: the folder.
        fewest: the fewest readable pictures that make sense for training.
        without: see `data_set`.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: it is not a folder, holds fewer than `fewest` readable pictures, or captions.csv has other columns.
    """
    entries, skipped = data_set(path, without=without)
    images, read = [], []
    for entry in tqdm(entries, desc="reading pictures", unit="picture"):
        try:
            images.append(read_picture(entry.read()))
        except OSError as error:
            skipped.append(f"{entry.key}: {str(error).splitlines()[0]}")
            continue
        read.append(entry)
    if len(images) < fewest:
        raise ValueError(
            f"image_folder: path: wanted at least {fewest} readable pictures, got {len(images)} in {path}"
            + (f" ({len(skipped)} could not be read, the first: {skipped[0]})" if skipped else "")
        )
    captions, bases, groups = [e.text for e in read], bases_of(read), [e.group for e in read]
    return Pictures(
        torch.stack(images), captions, bases, [""] * len(images), groups, split_by_base(bases, groups), skipped
    )


def bases_of(entries: Sequence[Entry]) -> list[str]:
    """What is held out together: the pictures of one caption.

    Each picture is its own where there are fewer than ten captions ("IMG_0001.jpg"), and in a class that has one caption for
    all, as ImageNet's files do ("n01440764/n01440764_18.JPEG"): nothing of that class could be held out otherwise.
    """
    captions = [entry.text for entry in entries]
    if len(set(captions)) < FEWEST_CAPTIONS:
        return [entry.key for entry in entries]
    said: dict[str, set[str]] = {}
    for entry, caption in zip(entries, captions, strict=True):
        said.setdefault(entry.group, set()).add(caption)
    return [e.key if len(said[e.group]) == 1 else c for e, c in zip(entries, captions, strict=True)]
