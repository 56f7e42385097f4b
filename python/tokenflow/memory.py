"""What a process does with memory that was freed."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc to return no freed memory to the system; whether it was there to be told.

    By itself it returns a map of many megabytes as soon as it is freed, and the next one's pages are handed out and cleared
    again, map for map. This is for programs of their own, which end when their work does: the process stays as large as it was.
    """
    try:
        libc = ctypes.CDLL(None)
    except TypeError:  # Windows
        return False
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
