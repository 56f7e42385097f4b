"""Any folder of images as a picture set; captions come from captions.csv or from the file names."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import torch
from tqdm import tqdm

from tokenflow.data.pictures import Pictures, read_picture, split_by_base

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
FEWEST = 32
FEWEST_CAPTIONS = 10
CAPTION_FILE = "captions.csv"


def image_folder(path: Path, *, fewest: int = FEWEST) -> Pictures:
    """Read every image below `path`, broken ones left out and named in `skipped`.

    A file `captions.csv` with the columns file and caption gives the texts; a picture that it does not list, or all of them
    without that file, is captioned by its file name ("red_apple-03.png" -> "red apple"). Pictures of one caption share a
    base and are held out together; where there are fewer than ten captions ("IMG_0001.jpg"), every picture is its own base.
    If the pictures lie in sub-folders, the first folder's name is their group.

    Args:
        path: the folder.
        fewest: the fewest readable pictures that make sense for training.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: it is not a folder, holds fewer than `fewest` readable pictures, or captions.csv has other columns.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"image_folder: path: wanted a folder of images, got {path}, which does not exist")
    if not path.is_dir():
        raise ValueError(f"image_folder: path: wanted a folder of images, got the file {path}")
    listed = read_captions(path / CAPTION_FILE)
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in SUFFIXES)
    images, names, captions, groups, skipped = [], [], [], [], []
    for file in tqdm(files, desc="reading pictures", unit="picture"):
        name = file.relative_to(path).as_posix()
        try:
            images.append(read_picture(file))
        except OSError as error:
            skipped.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        names.append(name)
        captions.append(listed.get(name) or listed.get(file.name) or caption_of(file.stem))
        groups.append(name.split("/")[0] if "/" in name else "")
    if len(images) < fewest:
        raise ValueError(
            f"image_folder: path: wanted at least {fewest} readable pictures, got {len(images)} in {path}"
            + (f" ({len(skipped)} could not be read, the first: {skipped[0]})" if skipped else "")
        )
    bases = list(captions) if len(set(captions)) >= FEWEST_CAPTIONS else names
    return Pictures(
        torch.stack(images), captions, bases, [""] * len(images), groups, split_by_base(bases, groups), skipped
    )


def read_captions(path: Path) -> dict[str, str]:
    """The file -> caption table, empty without the file.

    Raises:
        ValueError: the columns file and caption are not there.
    """
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        columns = reader.fieldnames or []
        if not {"file", "caption"} <= set(columns):
            raise ValueError(
                f"image_folder: {CAPTION_FILE}: wanted the columns file and caption, got {', '.join(columns) or 'nothing'}"
            )
        return {row["file"].strip(): (row["caption"] or "").strip() for row in reader if row["file"]}


def caption_of(stem: str) -> str:
    """A caption from a file name: words apart, a trailing number dropped.

    >>> caption_of("red_apple-03")
    'red apple'
    """
    words = re.sub(r"[_\-.\s]+", " ", stem).strip()
    return re.sub(r"\s*\d+$", "", words) or words
