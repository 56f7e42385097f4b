"""Files that are whole or absent, whenever the process dies."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str, *, writer: str = "") -> None:
    """Write `content` under a temporary name, flush it to disk, then rename it to `path`.

    Args:
        path: the file.
        content: all of it; text is written as UTF-8.
        writer: part of the temporary name, another for each process that may write the same file at the same time.
    """
    temporary = path.with_name(f"{path.name}{writer}.part")
    with temporary.open("wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
