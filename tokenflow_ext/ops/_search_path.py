"""Which scan a native search runs, and how to see it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from tokenflow_ext.ops._native import _C

PRECISIONS = ("auto", "full", "certified")


@dataclass
class SearchTrace:
    """Rows that native searches answered, by the scan that answered them.

    Attributes:
        int8: rows of the certified 8-bit scan.
        full: rows of the scan in float32 (float64 for float64), the fallback's included.
        fallback: rows that the certified scan could not narrow down and handed over.
        rescored: segments of codes that certified rows were scored on again, canonically.
    """

    int8: int = 0
    full: int = 0
    fallback: int = 0
    rescored: int = 0


@contextlib.contextmanager
def search_precision(precision: str) -> Iterator[None]:
    """Forces the scan of native searches in this process; the ids are the same bits either way.

    "auto" takes 8-bit integers with a certificate where they are faster and the processor has AVX2 or AVX512-VNNI,
    "full" always scans in the type of the scores, "certified" takes 8 bits wherever they are possible: float32, more
    than 64 rows, such a processor.

    Args:
        precision: "auto", "full" or "certified".

    Raises:
        ValueError: another word.
        RuntimeError: "certified" where this processor or build cannot.

    Source: docs/certified_search.md.

    Example:
        >>> with search_precision("full"), trace() as searched:
        ...     _ = nearest_code(torch.randn(100, 8), torch.randn(64, 8))
        >>> searched.full
        100
    """
    if precision not in PRECISIONS:
        raise ValueError(f"search_precision: precision: wanted one of {', '.join(PRECISIONS)}, got {precision!r}")
    if _C is None:
        if precision == "auto":
            yield
            return
        raise RuntimeError(f"search_precision: precision: wanted the native core for {precision}, but it was not built")
    if precision == "certified" and _C.build_info()["certified_search"] == "none":
        raise RuntimeError(
            "search_precision: precision: wanted AVX2 or AVX512-VNNI for certified, which does not run here"
        )
    before = _C.search_precision(PRECISIONS.index(precision))
    try:
        yield
    finally:
        _C.search_precision(before)


@contextlib.contextmanager
def trace() -> Iterator[SearchTrace]:
    """Counts what native searches of this process do inside the block; complete when the block ends.

    Yields:
        A `SearchTrace`.

    Example:
        >>> with trace() as searched:
        ...     _ = nearest_code(torch.randn(3, 8), torch.randn(64, 8))
        >>> searched
        SearchTrace(int8=0, full=3, fallback=0, rescored=0)
    """
    before = _C.search_counts() if _C is not None else {}
    counts = SearchTrace()
    try:
        yield counts
    finally:
        for name, start in before.items():
            setattr(counts, name, _C.search_counts()[name] - start)
