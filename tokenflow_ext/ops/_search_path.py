"""Which scan a native search runs, and how to see it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from tokenflow_ext.ops import _native
from tokenflow_ext.ops._native import _C

PRECISIONS = ("auto", "full", "certified")


@dataclass
class SearchTrace:
    """Rows that native searches answered, by the scan that answered them.

    Attributes:
        int8: rows of the certified 8-bit scan.
        bf16: rows of the certified bfloat16 scan, on CUDA.
        full: rows of the scan in float32 (float64 for float64), the fallback's included; on CUDA, the fallback's alone.
        fallback: rows that the certified scan could not narrow down and handed over.
        rescored: segments of codes that certified rows were scored on again, canonically.
    """

    int8: int = 0
    bf16: int = 0
    full: int = 0
    fallback: int = 0
    rescored: int = 0


@contextlib.contextmanager
def search_precision(precision: str) -> Iterator[None]:
    """Forces the scan of native searches in this process; the ids are the same bits either way.

    "auto" takes 8-bit integers with a certificate where they are faster and the processor has AVX2 or AVX512-VNNI,
    "full" always scans in the type of the scores, "certified" takes 8 bits wherever they are possible: float32, more
    than 64 rows, such a processor. On CUDA "certified" scans in bfloat16 on the tensor cores, up to 656 channels, and
    "auto" does not: no GPU has said yet that it is faster.

    Args:
        precision: "auto", "full" or "certified".

    Raises:
        ValueError: another word.
        RuntimeError: "certified" where neither this processor nor a GPU can.

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
    cores = _native.cuda_cores()
    if precision == "certified" and _C.build_info()["certified_search"] == "none" and not cores:
        raise RuntimeError(
            "search_precision: precision: wanted AVX2 or AVX512-VNNI for certified, which does not run here"
        )
    before = _C.search_precision(PRECISIONS.index(precision))
    certified = [core.certify(precision == "certified") for core in cores]
    try:
        yield
    finally:
        _C.search_precision(before)
        for core, was in zip(cores, certified, strict=True):
            core.certify(was)


@contextlib.contextmanager
def trace() -> Iterator[SearchTrace]:
    """Counts what native searches of this process do inside the block; complete when the block ends.

    Yields:
        A `SearchTrace`.

    Example:
        >>> with trace() as searched:
        ...     _ = nearest_code(torch.randn(3, 8), torch.randn(64, 8))
        >>> searched
        SearchTrace(int8=0, bf16=0, full=3, fallback=0, rescored=0)
    """
    counts = SearchTrace()
    with _native.traced() as on_cuda:
        before, before_on_cuda = _C.search_counts() if _C is not None else {}, on_cuda()
        try:
            yield counts
        finally:
            for name, start in before.items():
                setattr(counts, name, _C.search_counts()[name] - start)
            answered, handed_over, scored = (b - a for a, b in zip(before_on_cuda, on_cuda(), strict=True))
            counts.bf16 += answered
            counts.full += handed_over
            counts.fallback += handed_over
            counts.rescored += scored
