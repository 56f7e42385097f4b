"""A data set as a list of pictures that are read one by one: a folder of images, or tar shards as webdataset writes them.

A sample of a shard is the run of members of one name up to its first dot: `x/12.jpg`, `x/12.txt` (caption), `x/12.cls` (class).
Only the headers of a shard are read here; a picture's bytes are then read from their place in the file, so that a worker
process shares nothing with another and a data set can be entered anywhere.
"""

from __future__ import annotations

import csv
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tokenflow.files import printable

SUFFIXES = {f".{suffix}" for suffix in "png jpg jpeg jfif webp avif gif bmp tif tiff jp2 ppm pgm heic heif".split()}
"""What counts as a picture; one that Pillow cannot read (HEIC, as a rule) is then named instead of passed over."""
CAPTION_FILE = "captions.csv"
WANTED = "wanted a folder of images or of tar shards, or one shard"


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture that has not been read yet.

    Attributes:
        key: its name in the data set: a path in the folder, or shard/member; of a file by itself, its path.
        path: file that holds it.
        offset: first byte.
        size: number of bytes, None for the whole file.
        group: class, "" where unknown.
        caption: text that came with it, "" where none did.
    """

    key: str
    path: str
    offset: int = 0
    size: int | None = None
    group: str = ""
    caption: str = ""

    @classmethod
    def of(cls, path: Path) -> Entry:
        """An image file by itself.

        Raises:
            FileNotFoundError: it is none, or not there.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"pictures: wanted image files, got {path}, which does not exist"
                if not path.exists()
                else f"pictures: wanted image files, got {path}"
            )
        return cls(printable(str(path)), str(path))

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            OSError: the file is gone or cut off.
        """
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            content = handle.read(-1 if self.size is None else self.size)
        if self.size is not None and len(content) < self.size:
            raise OSError(f"wanted {self.size} bytes of the shard, got {len(content)}")
        return content

    @property
    def text(self) -> str:
        """Its caption, or else the words of its file name."""
        return self.caption or caption_of(PurePosixPath(self.key).stem)


class DataSet(NamedTuple):
    """Entries in a fixed order, and a sentence about each folder or shard that could not be read to its end."""

    entries: list[Entry]
    broken: list[str]


def data_set(path: str | Path, *, without: Path | None = None) -> DataSet:
    """The pictures of a folder or of tar shards.

    In a folder, captions come from `captions.csv` (columns file and caption) or from a text file beside the picture (`cat.txt`
    for `cat.jpg`); the first sub-folder's name is the class. Tar files in it are shards: their pictures take their place among
    the image files, in the order of the paths. Links to folders outside are followed.

    Args:
        path: the folder, or one shard.
        without: a folder whose files are left out, such as one that pictures are written to.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is another kind of file, or captions.csv has other columns.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data: path: {WANTED}, got {path}, which does not exist")
    if path.is_file():
        if path.suffix != ".tar":
            raise ValueError(f"data: path: {WANTED}, got the file {path}")
        return DataSet(*tar_entries(path, path.name))
    files, broken = _files(path, without)
    listed = read_captions(path / CAPTION_FILE)
    texts = {file.with_suffix("") for file in files if file.suffix == ".txt"}
    entries = []
    for file in files:
        key = printable(file.relative_to(path).as_posix())
        if file.suffix == ".tar":
            found, trouble = tar_entries(file, key)
            entries += found
            broken += trouble
        elif file.suffix.lower() in SUFFIXES:
            caption = listed.get(key) or listed.get(file.name) or ""
            if not caption and file.with_suffix("") in texts:
                try:
                    caption = file.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip()
                except OSError as error:
                    broken.append(f"{key}: its caption cannot be read ({error.strerror})")
            entries.append(Entry(key, str(file), group=_first_folder(key), caption=caption))
    return DataSet(entries, broken)


def _files(path: Path, without: Path | None) -> tuple[list[Path], list[str]]:
    """The files below a folder but for those of another in order, and a sentence about each folder in it that cannot be read.

    A link to a folder is followed once, unless that folder lies in the tree already, or around it.
    """
    inside = lambda a, b: f"{a}{os.sep}".startswith(f"{b}{os.sep}")  # noqa: E731
    root, broken = os.path.realpath(path), []
    files, seen = [], {root, *([] if without is None else [os.path.realpath(without)])}
    unread = lambda error: broken.append(f"{printable(os.path.relpath(error.filename, path))}: {error.strerror}")  # noqa: E731
    for folder, folders, names in os.walk(path, followlinks=True, onerror=unread):
        files += [Path(folder, name) for name in names]
        followed = []
        for name in sorted(folders):
            place = os.path.realpath(os.path.join(folder, name))
            known = os.path.islink(os.path.join(folder, name)) and (inside(place, root) or inside(root, place))
            if place not in seen and not known:
                seen.add(place)
                followed.append(name)
        folders[:] = followed
    return sorted(files), broken


def tar_entries(path: Path, name: str) -> tuple[list[Entry], list[str]]:
    """The pictures of one shard, their keys beginning with `name`; and a sentence if it is broken somewhere."""
    members: list[tarfile.TarInfo] = []
    trouble = []
    captions: dict[str, str] = {}
    groups: dict[str, str] = {}
    try:
        with path.open("rb") as handle:
            with tarfile.open(fileobj=handle, mode="r:") as tar:
                for member in tar:
                    if not member.isreg() or member.issparse():
                        continue
                    stem, suffix = _sample(member.name)
                    if suffix in (".txt", ".cls"):
                        text = tar.extractfile(member).read().decode("utf-8", "replace").strip()
                        (captions if suffix == ".txt" else groups)[stem] = text
                    elif suffix in SUFFIXES:
                        members.append(member)
                end = tar.offset
            # tarfile takes a broken header behind the first for the end of the archive, which is a block of zeros or nothing.
            handle.seek(end)
            if handle.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("broken header")
    except (tarfile.TarError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        trouble.append(f"{name}: broken behind {len(members)} pictures ({reason})")
    entries = [
        Entry(
            printable(f"{name}/{member.name}"),
            str(path),
            member.offset_data,
            member.size,
            groups.get(_sample(member.name)[0]) or _first_folder(printable(member.name.removeprefix("./"))),
            captions.get(_sample(member.name)[0], ""),
        )
        for member in members
    ]
    return entries, trouble


def _sample(name: str) -> tuple[str, str]:
    """The name up to the first dot of its last part, and its last suffix.

    >>> _sample("a.b/0012.input.JPG")
    ('a.b/0012', '.jpg')
    """
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".")[0] or path.name)), path.suffix.lower()


def _first_folder(key: str) -> str:
    return key.split("/")[0] if "/" in key else ""


def read_captions(path: Path) -> dict[str, str]:
    """The file -> caption table, empty without the file.

    Raises:
        ValueError: the columns file and caption are not there.
    """
    return read_columns(path, "file", "caption") if path.exists() else {}


def read_columns(path: Path, key: str, value: str) -> dict[str, str]:
    """Two columns of a CSV file as a table.

    Raises:
        ValueError: they are not there, or it is no CSV file in UTF-8.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns, rows = reader.fieldnames or [], list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"data: {path.name}: wanted a CSV file in UTF-8, got {error}") from error
    if not {key, value} <= set(columns):
        raise ValueError(
            f"data: {path.name}: wanted the columns {key} and {value}, got {', '.join(columns) or 'nothing'}"
        )
    return {row[key].strip(): (row[value] or "").strip() for row in rows if row[key]}


def caption_of(stem: str) -> str:
    """A caption from a file name: words apart, a trailing number dropped.

    >>> caption_of("red_apple-03")
    'red apple'
    """
    words = re.sub(r"[_\-.\s]+", " ", stem).strip()
    return re.sub(r"\s*\d+$", "", words) or words
