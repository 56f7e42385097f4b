"""code_statistics and ema_update_ on the emulated kernels: the CPU's bits, and the twins in float64."""

import pytest
import torch
from harness import METRICS, assert_near, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import reference
from tokenflow_ext.ops import code_statistics, ema_update_
from tokenflow_ext.ops.search import tables_of

from .test_lookup import CHUNK, cancelling, in_chunks, integers

HALVES = [torch.float32, torch.float16, torch.bfloat16]


def both(x, indices, codes):
    """(counts, sums) of the emulated and of the CPU's kernels."""
    return [code_statistics(x, indices, codes, backend=backend) for backend in ("emulated", "native")]


def by_hand(core, guarded, x, indices, codes, sums=True, shift=0):
    """(counts, sums or None, [ids outside, rows not finite]) of the kernels themselves, in outputs amid guards."""
    counts, outside = guarded(x.shape[1], codes, shift=shift), torch.zeros(2, dtype=torch.int64)
    sums = guarded(x.shape[1], codes, x.shape[2], shift=shift) if sums else None
    core.code_statistics(x, indices, counts, sums, -1, 0, outside)
    return counts, sums, outside.tolist()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize(
    ("groups", "codes", "width"), [(1, 1, 8), (3, 1, 32), (1, 31, 257), (3, 31, 72), (1, 4097, 40), (2, 4097, 8)]
)
def test_bits_of_the_cpu(rows, groups, codes, width, dtype):
    x, indices = normal(rows, groups, width, seed=1, dtype=dtype), integers(rows, groups, high=codes)
    emulated, native = both(x, indices, (groups, codes))
    assert same_bits(emulated[0], native[0]) and same_bits(emulated[1], native[1])
    counts, sums = reference.code_statistics(x.double(), indices, (groups, codes))
    assert torch.equal(emulated[0].double(), counts)
    assert_near(emulated[1], sums, 1e-6)


def test_popular_codes_and_many_rows(core, guarded, schedule):
    """Three blocks of the sort; half of the rows chose one code, whose chunks are added in order."""
    x, indices = cancelling(5000, 4).view(2500, 2, 4), integers(2500, 2, high=700)
    indices[::2] = 699
    x[7, 0, 3], x[9, 1, 0] = torch.nan, -torch.inf
    counts, sums, left_out = by_hand(core, guarded, x, indices, 700, shift=1)
    assert left_out == [0, 2]
    for g in range(2):
        good = x[:, g].isfinite().all(-1)
        rows, ids = x[good, g], indices[good, g]
        assert torch.equal(counts[g], torch.bincount(ids, minlength=700).float()) and counts[g, 699] > CHUNK
        for k in (0, 350, 699):
            assert same_bits(sums[g, k], in_chunks(rows[ids == k]))


@pytest.mark.parametrize("with_sums", [True, False])
def test_rows_left_out_are_counted(core, guarded, with_sums, schedule):
    x, indices = normal(301, 2, 19, seed=1), integers(301, 2, high=9)
    x[3, 0, 18], x[66, 1, 0], x[67, 1, 9] = torch.nan, torch.inf, -torch.inf
    indices[5, 0], indices[66, 0], indices[3, 0] = -1, 9, 2**33  # the last one is outside and not finite
    outside = (indices < 0) | (indices > 8)
    used = x.isfinite().all(-1) & ~outside
    counts, sums, left_out = by_hand(core, guarded, x, indices, 9, with_sums)
    assert left_out == [3, 2]
    for g in range(2):
        assert torch.equal(counts[g], torch.bincount(indices[used[:, g], g], minlength=9).float())
        expected = torch.zeros(9, 19, dtype=torch.float64)
        expected.index_add_(0, indices[used[:, g], g], x[used[:, g], g].double())
        assert not with_sums or same_bits(sums[g], expected.float())
    core.code_statistics(x, indices, counts, sums, -1, 0, None)


@pytest.mark.parametrize("ids", ["one", "two", "one a group", "few", "many", "none"])
def test_counts_alone(core, guarded, ids, schedule):
    """Warps whose rows have one code add once."""
    indices = (
        {
            "one": torch.zeros(700, 3),
            "two": torch.arange(2100).view(700, 3) % 2,
            "one a group": torch.arange(3).expand(700, 3),
            "few": integers(700, 3, high=5),
            "many": integers(700, 3, high=1200),
            "none": torch.full((700, 3), -1),
        }[ids]
        .long()
        .contiguous()
    )
    counts, _, left_out = by_hand(core, guarded, normal(700, 3, 4), indices, 1200, sums=False)
    assert left_out == [2100 if ids == "none" else 0, 0]
    inside = indices >= 0
    for g in range(3):
        assert torch.equal(counts[g], torch.bincount(indices[inside[:, g], g], minlength=1200).float())


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_clear_many_counts(core, guarded, rows):
    indices = torch.full((rows, 1), 2999)
    counts, _, _ = by_hand(core, guarded, normal(rows, 1, 3), indices, 3000, sums=False)
    assert counts[0, 2999] == rows and counts.sum() == rows


def test_views():
    x, indices = normal(42, 2, 5, seed=1)[1:], integers(42, 2, high=11)[1:]
    emulated, native = both(x, indices, (2, 11))
    assert same_bits(emulated[1], native[1])
    emulated, native = both(x.transpose(0, 1), indices.T, 11)
    assert same_bits(emulated[1], native[1])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 300), codes=st.integers(1, 600), width=st.integers(1, 20), groups=st.integers(1, 3),
    seed=st.integers(0, 99), skew=st.booleans(), dtype=st.sampled_from(HALVES),
)  # fmt: skip
def test_any_shape(rows, codes, width, groups, seed, skew, dtype):
    x, indices = normal(rows, groups, width, seed=seed, dtype=dtype), integers(rows, groups, high=codes, seed=seed)
    if skew:
        indices[::2] = codes - 1
    emulated, native = both(x, indices, (groups, codes))
    assert same_bits(emulated[0], native[0]) and same_bits(emulated[1], native[1])


def ema_state(groups, codes, width, seed=0):
    """codebook, ema_counts, ema_sums, and a batch's counts and sums in which every third code has no row."""
    counts = integers(groups, codes, high=5, seed=seed).float() + 1
    counts[:, 1::3] = 0
    codebook = normal(groups, codes, width, seed=seed)
    sums = normal(groups, codes, width, seed=seed + 1) * counts[..., None]
    return [codebook, normal(groups, codes, seed=seed + 2).abs() + 0.1, 2 * codebook, counts, sums]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalize_mean", [False, True])
@pytest.mark.parametrize(
    ("groups", "codes", "width"), [(1, 1, 8), (3, 31, 32), (2, 33, 257), (1, 4097, 8), (2, 100, 1), (1, 64, 72)]
)
def test_ema_has_the_bits_of_the_cpu(groups, codes, width, normalize_mean, metric):
    state, other = ema_state(groups, codes, width), ema_state(groups, codes, width)
    exact = [t.double() for t in state]
    options = {"decay": 0.8, "eps": 1e-3, "metric": metric, "normalize_mean": normalize_mean}
    ema_update_(*state, **options, backend="emulated")
    ema_update_(*other, **options, backend="native")
    assert all(same_bits(a, b) for a, b in zip(state, other))
    reference.ema_update_(*exact, **options)
    for name, a, b in zip(("codebook", "ema_counts", "ema_sums"), state, exact):
        assert_near(a, b, 2e-6, name)


def test_ema_of_tables_in_every_schedule(core, guarded, schedule):
    """Widths that eight does not divide, each table unit by itself; written in place and nowhere else."""
    tables = tables_of([5, 17, 1], [1.0, 1.0, 1.0], "cosine")
    state = ema_state(2, 45, 23)
    written = [guarded(*t.shape, shift=1) for t in state[:3]]
    for a, b in zip(written, state):
        a.copy_(b)
    core.ema_update(*written, *state[3:], tables, 0.9, 1e-5, True, -1, 0, None)
    expected = [t.clone() for t in state]
    for g in range(2):
        parts = [t.split([5, 17, 1], dim=-1) for t in (state[0][g], state[2][g], state[4][g])]
        for t, at in ((0, 0), (1, 5), (2, 22)):
            one = [parts[0][t].contiguous()[None], state[1][g : g + 1].clone(), parts[1][t].contiguous()[None],
                   state[3][g : g + 1], parts[2][t].contiguous()[None]]  # fmt: skip
            ema_update_(*one, decay=0.9, metric="cosine", normalize_mean=True, backend="native")
            width = one[0].shape[-1]
            expected[0][g, :, at : at + width], expected[2][g, :, at : at + width] = one[0][0], one[2][0]
            expected[1][g] = one[1][0]
    assert all(same_bits(a, b) for a, b in zip(written, expected))
    idle = state[3] == 0
    assert same_bits(written[0][idle], state[0][idle]), "codes without rows keep their vector"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 3), codes=st.integers(1, 300), width=st.integers(1, 40), seed=st.integers(0, 99),
    metric=st.sampled_from(METRICS), normalize_mean=st.booleans(), decay=st.floats(0, 1),
)  # fmt: skip
def test_any_ema(groups, codes, width, seed, metric, normalize_mean, decay):
    state, other = ema_state(groups, codes, width, seed), ema_state(groups, codes, width, seed)
    options = {"decay": decay, "metric": metric, "normalize_mean": normalize_mean}
    ema_update_(*state, **options, backend="emulated")
    ema_update_(*other, **options, backend="native")
    assert all(same_bits(a, b) for a, b in zip(state, other))


def test_float64_is_refused(core):
    wide, ids = normal(3, 1, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="code_statistics: x: wanted .* got float64"):
        core.code_statistics(wide, ids, torch.empty(1, 4), None, -1, 0, None)
    state = [t.double() for t in ema_state(1, 3, 2)]
    with pytest.raises(ValueError, match="ema_update_: codebook: wanted contiguous float32"):
        core.ema_update(*state, tables_of([2], [1.0], "l2"), 0.9, 1e-5, False, -1, 0, None)
