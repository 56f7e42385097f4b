"""The CUDA search, emulated, against the CPU's: ids and scores bit for bit, in every order of threads and blocks."""

import warnings

import emulator
import pytest
import torch
from harness import METRICS, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import ops

SHAPES = [
    (0, 5, 8, 1),
    (1, 1, 8, 1),
    (1, 4097, 8, 1),
    (33, 31, 1, 2),
    (130, 4097, 8, 1),
    (33, 200, 40, 3),
    (140, 300, 72, 1),
    (5, 700, 257, 1),
    (150, 129, 200, 1),
    (9, 64, 13, 1),
    (35, 140, 700, 1),
]
"""Rows, codes, width, groups: both tiles, one and several ranges, rows that stay in a block and rows that do not."""


def hard(rows: int, codes: int, width: int, groups: int, seed: int = 0):
    """Rows and codes with exact ties, a zero row, rows and codes that are not finite."""
    x, codebook = normal(rows, groups, width, seed=seed), normal(groups, codes, width, seed=seed + 1)
    if codes > 4:
        codebook[:, codes // 2] = codebook[:, codes - 1] = codebook[:, 0]
    if codes > 30:
        codebook[:, 3, 0], codebook[:, 5] = torch.inf, torch.nan
    if rows > 2:
        x[0], x[1], x[2, 0, 0] = codebook[0, 0], 0, torch.nan
    if rows > 4:
        x[3, 0, width - 1] = -torch.inf
    return x, codebook


def same(x, codebook, **options) -> None:
    """Ids, scores and the count of rows that are not finite, emulated as on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here, there = (
            ops.nearest_code(x, codebook, return_scores=True, **options, backend=backend)
            for backend in ("native", "emulated")
        )
    assert torch.equal(here[0], there[0])
    assert same_bits(here[1].nan_to_num(nan=7e37), there[1].nan_to_num(nan=7e37))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "codes", "width", "groups"), SHAPES)
def test_ids_and_scores_have_the_bits_of_the_cpu(rows, codes, width, groups, metric):
    x, codebook = hard(rows, codes, width, groups)
    same(x, codebook, metric=metric)
    same(x, codebook, metric=metric, topk=min(3, codes))
    if codes > 40:
        same(x, codebook, metric=metric, window=(3, codes - 2))


def test_in_any_order(schedule):
    for rows, codes, width, groups in [(33, 900, 8, 2), (140, 300, 40, 1), (3, 140, 700, 1)]:
        same(*hard(rows, codes, width, groups), metric="l2", topk=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_that_begin_anywhere(dtype):
    """Slices put rows and codes at addresses that no wide load likes."""
    x, codebook = hard(40, 200, 9, 1)
    same(x.to(dtype)[1:], codebook[:, 1:], metric="cosine")
    same(x[1:, 0].to(dtype), codebook[0, 1:], metric="l2")


@pytest.mark.parametrize("metric", METRICS)
def test_shared_tables_with_weights(metric):
    xs, tables = [normal(50, w, seed=w) for w in (32, 8, 3)], [normal(300, w, seed=w + 1) for w in (32, 8, 3)]
    for weights in (None, [1.0, 0.25, 0.0]):
        here, there = (
            ops.shared_nearest_code(xs, tables, metric=metric, weights=weights, backend=backend)
            for backend in ("native", "emulated")
        )
        assert torch.equal(here, there)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_codes_without_a_finite_score(value):
    """Where no code scores below +inf the lowest id comes first, and NaN comes last."""
    x, codebook = normal(5, 1, 8, seed=1), torch.full((1, 70, 8), value)
    for metric in METRICS:
        same(x, codebook, metric=metric, topk=3)
    codebook[0, ::2] = torch.nan
    same(x, codebook, metric="l2", topk=40)


def test_zeros_tie_whatever_their_sign():
    x = torch.tensor([[0.0, -0.0], [1.0, 0.0], [-0.0, -1.0]])
    codebook = torch.tensor([[0.0, 1.0], [-0.0, 0.0], [0.0, -0.0], [0.0, 0.0]])
    for metric in METRICS:
        same(x, codebook, metric=metric, topk=4)


def test_nothing_is_written_beside_the_outputs(core, guarded):
    """One row, one code and one number less than a tile: the neighbours of every output keep what they held."""
    for rows in (1, 31, 33, 129):
        x, codebook = normal(rows, 1, 8, seed=1), normal(1, 127, 8, seed=2)
        indices, scores = guarded(rows, 1, 2, dtype=torch.int64, shift=1), guarded(rows, 1, 2, shift=3)
        tables = ((8,), (1.0,), True, False, False)
        core.nearest_code(x, codebook, tables, 2, 0, 127, indices, scores, -1, 0, None)
        assert torch.equal(indices, ops.nearest_code(x, codebook, metric="l2", topk=2, backend="native"))


def test_launches(core):
    """Codes are packed once; a search and its keys' way out for every best code; few rows fill the GPU by ranges of codes."""
    ops.nearest_code(normal(8, 8), normal(16384, 8), metric="l2", backend="emulated")
    pack, search, unpack = core.take_launches()
    assert "pack" in pack[0] and "search" in search[0] and "unpack" in unpack[0]
    assert search[1] == (1, 8, 1), "wanted two blocks for each of the emulated GPU's four multiprocessors"
    ops.nearest_code(normal(8, 8), normal(64, 8), metric="l2", topk=3, backend="emulated")
    assert [("search" in launch[0]) for launch in core.take_launches()] == [False, *[True, False] * 3]


@pytest.mark.parametrize(
    ("rows", "codes", "width", "tile", "stays"),
    [
        (32, 700, 8, 32, True),
        (33, 300, 8, 32, True),
        (33, 500, 8, 128, True),
        (140, 300, 152, 128, True),
        (140, 300, 153, 128, False),
        (20, 300, 440, 32, True),
        (20, 300, 441, 32, False),
    ],
)
def test_tiles(core, rows, codes, width, tile, stays):
    """Small tiles for few rows and for little work; rows too wide for 99 KB, all a block may have everywhere, are staged first."""
    x, codebook = normal(rows, width, seed=1), normal(codes, width, seed=2)
    same(x, codebook, metric="cosine")
    *packs, search, _ = core.take_launches()
    assert f"search_kernel<{tile}, {str(stays).lower()}>" in search[0] and len(packs) == 2 - stays
    assert search[3] + search[4] <= 99 * 1024


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    codes=st.integers(1, 300),
    width=st.integers(1, 24),
    metric=st.sampled_from(METRICS),
    schedule=st.sampled_from(emulator.SCHEDULES),
    seed=st.integers(0, 99),
)
def test_any_shape(rows, codes, width, metric, schedule, seed):
    emulator.configure(emulator.core(), schedule, seed)
    # Few distinct numbers: many exact ties.
    x = normal(rows, width, seed=seed).mul(2).round().div(2)
    same(x, normal(codes, width, seed=seed + 1).mul(2).round().div(2), metric=metric)
