"""Workspace of the kernels that sum rows by code (csrc/cpu/sums.h)."""

import torch

from tokenflow_ext.ops._native import threads

BUCKET_NUMBERS = 2**15  # sums of one bucket, in double: a quarter of a core's second-level cache
ALONE_NUMBERS = 2**15  # below these rows and codes a second thread costs more than it brings


def sum_space(rows: int, groups: int, codes: int, channels: int):
    """(members [G, N], starts [G, J, buckets], sums [J, size, C + 1]) for ids [N, G] into K codes, J threads.

    A bucket is 2^s codes: as many as the cache holds, fewer where that leaves threads without work.
    """
    workers = threads() if groups * (rows + codes) * channels > ALONE_NUMBERS else 1
    share = codes if workers == 1 else -(-groups * codes // (2 * workers))
    size = 1 << max(
        0, min((codes - 1).bit_length(), (BUCKET_NUMBERS // channels).bit_length() - 1, (share - 1).bit_length())
    )
    buckets = -(-codes // size)
    members = torch.empty((groups, rows) if buckets > 1 else 0, dtype=torch.int64)
    starts = torch.empty((groups, workers, buckets) if buckets > 1 else 0, dtype=torch.int64)
    return members, starts, torch.empty((workers, size, channels + 1), dtype=torch.float64)
