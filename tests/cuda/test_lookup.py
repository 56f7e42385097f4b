"""lookup on the emulated kernels: the CPU's bits, and the twin's gradient in float64."""

import numpy as np
import pytest
import torch
from harness import assert_near, leaves, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import reference
from tokenflow_ext.ops import lookup

CHUNK = 512
"""Rows of a code that are added one after another (csrc/cuda/sums.cuh)."""


def integers(*shape, high, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def both(indices, codebook, upstream):
    """(rows, gradient) of the emulated and of the CPU's kernels."""
    results = []
    for backend in ("emulated", "native"):
        (leaf,) = leaves(codebook)
        rows = lookup(indices, leaf, backend=backend)
        results.append((rows.detach(), *torch.autograd.grad(rows, leaf, upstream)))
    return results


def cancelling(rows, width, seed=0):
    """Rows whose sum is small beside them: every change in the order of additions shows in float32."""
    generator = torch.Generator().manual_seed(seed)
    large = normal(rows // 3, width, seed=seed) * 2.0**40
    x = torch.cat([large, -large, normal(rows - 2 * len(large), width, seed=seed + 1)])
    return x[torch.randperm(rows, generator=generator)]


def one_after_another(x):
    """Sums [C] of rows [n, C] in order, in float64."""
    x = x.double().numpy()
    return np.add.accumulate(x)[-1] if len(x) else np.zeros(x.shape[1])


def in_chunks(x):
    """Sums [C] as the kernels add the rows of one code."""
    parts = [one_after_another(part) for part in x.split(CHUNK)]
    return torch.from_numpy(one_after_another(torch.from_numpy(np.stack(parts)))).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize(
    ("groups", "codes", "width"), [(1, 1, 8), (3, 1, 32), (1, 31, 257), (3, 31, 72), (1, 4097, 40), (2, 4097, 8)]
)
def test_bits_of_the_cpu(rows, groups, codes, width, dtype):
    codebook, indices = normal(groups, codes, width, seed=1, dtype=dtype), integers(rows, groups, high=codes)
    upstream = normal(rows, groups, width, seed=2, dtype=dtype)
    emulated, native = both(indices, codebook, upstream)
    assert same_bits(emulated[0], native[0]) and same_bits(emulated[1], native[1])
    (wide,) = leaves(codebook.double())
    (exact,) = torch.autograd.grad(reference.lookup(indices, wide), wide, upstream.double())
    assert_near(emulated[1], exact, {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype])


@pytest.mark.parametrize("codes", [2, 256, 257, 65536, 65537])
def test_every_number_of_passes(codes, schedule):
    """Digits of 8 bits: one, two or three passes; 5000 rows are three blocks of the sort."""
    codebook, indices, upstream = normal(codes, 2, seed=1), integers(5000, high=codes), cancelling(5000, 2, seed=2)
    indices[:40], indices[40:80] = 0, codes - 1
    emulated, native = both(indices, codebook, upstream)
    counts = torch.bincount(indices, minlength=codes)
    short = counts <= CHUNK
    assert same_bits(emulated[0], native[0]) and same_bits(emulated[1][short], native[1][short])
    for k in (~short).nonzero()[:, 0]:
        assert same_bits(emulated[1][k], in_chunks(upstream[indices == k]))


@pytest.mark.parametrize("before", [0, 1, 511, 512, 700])
@pytest.mark.parametrize("rows", [512, 513, 1024, 1025, 3000])
def test_chunks_of_a_popular_code(rows, before):
    """Up to CHUNK rows a code is the CPU's sum; then chunks of its own, wherever it lies among the sorted rows."""
    order = torch.randperm(rows + before + 40, generator=torch.Generator().manual_seed(rows))
    indices = torch.cat([torch.zeros(before), torch.full((rows,), 1), torch.full((40,), 2)]).long()[order]
    upstream = cancelling(len(indices), 3)
    emulated, native = both(indices, normal(4, 3), upstream)
    for k in range(3):
        mine = upstream[indices == k]
        assert same_bits(emulated[1][k], in_chunks(mine) if len(mine) else torch.zeros(3))
        assert len(mine) > CHUNK or same_bits(emulated[1][k], native[1][k])
    assert not emulated[1][3].any()


def test_sums_show_their_order():
    """The rows above tell orders apart: backwards, or in chunks of another size, their sums have other bits."""
    x = cancelling(3000, 3)
    assert not same_bits(in_chunks(x), in_chunks(x.flip(0)))
    assert not same_bits(in_chunks(x), torch.from_numpy(one_after_another(x)).float())


def test_all_rows_of_all_groups_in_one_code(schedule):
    indices, upstream = torch.full((1300, 2), 6), cancelling(2600, 8).view(1300, 2, 8)
    emulated, _ = both(indices, normal(2, 9, 8), upstream)
    for g in range(2):
        assert same_bits(emulated[1][g, 6], in_chunks(upstream[:, g]))
        emulated[1][g, 6] = 0
    assert not emulated[1].any()


@pytest.mark.parametrize(("dtype", "width", "shift", "piece"), [
    (torch.float32, 8, 0, "uint4"), (torch.bfloat16, 8, 0, "uint4"), (torch.float32, 8, 1, "unsigned int"),
    (torch.float32, 3, 0, "unsigned int"), (torch.float16, 6, 0, "unsigned int"), (torch.float16, 8, 1, "unsigned short"),
    (torch.bfloat16, 5, 0, "unsigned short"), (torch.float64, 2, 0, "uint4"), (torch.float64, 3, 0, "unsigned int"),
])  # fmt: skip
def test_pieces_are_as_wide_as_addresses_allow(dtype, width, shift, piece, core, guarded):
    codebook, rows = guarded(2, 7, width, dtype=dtype, shift=shift), guarded(50, 2, width, dtype=dtype)
    codebook.copy_(normal(2, 7, width, seed=1, dtype=dtype))
    indices, counts = integers(50, 2, high=7), torch.zeros(2, dtype=torch.int64)
    core.lookup(indices, codebook, rows, -1, 0, counts)
    assert same_bits(rows, codebook[torch.arange(2), indices]) and counts.tolist() == [0, 0]
    assert [launch[0] for launch in core.take_launches()] == [f"lookup_kernel<{piece}>"]


@pytest.mark.parametrize(("codes", "passes"), [(200, 1), (300, 2), (65537, 3)])
def test_launches_do_not_depend_on_the_ids(codes, passes, core):
    """As graphs that are captured once need."""
    upstream, gradient, seen = normal(1500, 1, 2), torch.empty(1, codes, 2), []
    for ids in (integers(1500, 1, high=codes), torch.zeros(1500, 1), torch.full((1500, 1), -1)):
        core.take_launches()
        core.lookup_backward(ids.long(), upstream, gradient, -1, 0, None)
        seen.append(core.take_launches())
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 4 + 3 * passes
    assert not gradient.any()


def test_views(guarded, core):
    """Slices [1:] of ids, rows and gradients."""
    codebook, indices, upstream = normal(12, 2, 5, seed=1), integers(41, 2, high=11), normal(41, 2, 5, seed=2)
    emulated, native = both(indices[1:], codebook[1:].transpose(0, 1), upstream[1:])
    assert same_bits(emulated[0], native[0]) and same_bits(emulated[1], native[1])
    gradient = guarded(2, 11, 5, shift=1)
    core.lookup_backward(indices[1:], upstream[1:], gradient, -1, 0, None)
    assert same_bits(gradient, native[1])


def test_ids_outside_are_nan_without_gradient(core, guarded, schedule):
    codebook, indices = normal(2, 9, 8, seed=1), integers(70, 2, high=9)
    indices[3, 0], indices[40, 1], indices[41, 1], indices[42, 1] = -1, 9, 2**40, -(2**62)
    outside = (indices < 0) | (indices > 8)
    rows, counts = guarded(70, 2, 8), torch.tensor([5, 7])
    core.lookup(indices, codebook, rows, -1, 0, counts)
    assert rows[outside].isnan().all() and counts.tolist() == [9, 7]
    assert same_bits(rows[~outside], codebook[torch.arange(2), indices.clamp(0, 8)][~outside])
    core.lookup(indices, codebook, rows, -1, 0, None)
    upstream, gradient, expected = normal(70, 2, 8, seed=2), guarded(2, 9, 8), torch.zeros(2, 9, 8)
    core.lookup_backward(indices, upstream, gradient, -1, 0, counts)
    for g in range(2):
        expected[g].index_add_(0, indices[~outside[:, g], g], upstream[~outside[:, g], g])
    assert_near(gradient, expected, 1e-6)
    assert counts.tolist() == [9, 7], "backward counts nothing twice"


def test_gradients_in_float64_are_refused(core):
    wide = normal(3, 1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="lookup_backward: grad_rows: wanted .* got float64"):
        core.lookup_backward(torch.zeros(3, 1, dtype=torch.int64), wide, wide[:1], -1, 0, None)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 300), codes=st.integers(1, 600), width=st.integers(1, 20), groups=st.integers(1, 3),
    seed=st.integers(0, 99), skew=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_any_shape(rows, codes, width, groups, seed, skew, dtype):
    codebook, indices = (
        normal(groups, codes, width, seed=seed, dtype=dtype),
        integers(rows, groups, high=codes, seed=seed),
    )
    if skew:
        indices[::2] = codes - 1
    emulated, native = both(indices, codebook, normal(rows, groups, width, seed=seed + 1, dtype=dtype))
    assert same_bits(emulated[0], native[0]) and same_bits(emulated[1], native[1])
