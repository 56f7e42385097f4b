"""Files that are whole or absent, whenever the process dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, writer: str = "") -> Iterator[Path]:
    """A temporary name to write a file under; when the block ends it is flushed to disk and renamed to `path`.

    Args:
        path: the file.
        writer: part of the temporary name, another for each process that may write the same file at the same time.
    """
    temporary = path.with_name(f"{path.name}{writer}.part")
    yield temporary
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    # Else a power cut may undo the renaming and keep what was done after it, such as the removal of an older file.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes | str, *, writer: str = "") -> None:
    """`content` as the file `path`, text as UTF-8, see `replacing`."""
    with replacing(path, writer=writer) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def printable(name: str) -> str:
    """A file name that can be printed and written as UTF-8: bytes that are none are spelled out.

    >>> printable("caf\\udce9.jpg"), printable("été.jpg")
    ('caf\\\\xe9.jpg', 'été.jpg')
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")
