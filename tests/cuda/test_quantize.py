"""quantize and shared_quantize on the emulated kernels: the CPU's bits forward and backward, the surrogate in float64."""

import pytest
import torch
from harness import METRICS, assert_gradients, assert_near, frozen_quantize, leaves, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext.ops import quantize, shared_quantize
from tokenflow_ext.ops._native import counts
from tokenflow_ext.ops.quantize import HITS, NOTHING, SUMS, quantize_and_count
from tokenflow_ext.ops.search import tables_of

WEIGHTS = {"commitment_weight": 0.4, "codebook_weight": 1.5}
HALVES = [torch.float32, torch.float16, torch.bfloat16]
FORWARD = ("quantized", "indices", "loss", "searched", "code_rows", "code_norms")
NONE = {name: None for name in FORWARD[3:]}


def both(x, codebook, metric, upstream, **options):
    """(quantized, ids, loss, gradient of x, gradient of the codebook) of the emulated and of the CPU's kernels."""
    results = []
    for backend in ("emulated", "native"):
        inputs = leaves(x, codebook)
        out = quantize(*inputs, metric=metric, **{**WEIGHTS, **options}, backend=backend)
        gradients = torch.autograd.grad((out.quantized, out.loss), inputs, (upstream, torch.tensor(3.0)))
        results.append([t.detach() for t in (*out, *gradients)])
    return results


def assert_same(emulated, native):
    """The same bits; the loss, which adds its rows in another order, in double, to its last bit but one."""
    for name, a, b in zip(("quantized", "indices", "loss", "grad_x", "grad_codebook"), emulated, native):
        if name == "loss":
            assert_near(a, b, 1.2e-7, name)
        else:
            assert same_bits(a, b), name


def outputs(guarded, x, codebook, tables, **others):
    """What the kernel writes, in memory amid guards, a number off its alignment."""
    rows, groups, width = x.shape
    made = {
        "quantized": guarded(*x.shape, dtype=x.dtype, shift=1),
        "indices": guarded(rows, groups, dtype=torch.int64),
        "loss": guarded(),
        "searched": guarded(*x.shape, shift=1),
        "code_rows": guarded(*x.shape, shift=1),
        "code_norms": guarded(rows, groups, len(tables[0]), shift=1),
    }
    return {**made, **others}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize(
    ("groups", "codes", "width"), [(1, 1, 8), (3, 1, 32), (1, 31, 257), (3, 31, 72), (1, 4097, 8), (1, 500, 40)]
)
def test_bits_of_the_cpu(rows, groups, codes, width, metric):
    dtype = HALVES[(rows + width) % 3]
    x, codebook = normal(rows, groups, width, seed=1, dtype=dtype), normal(groups, codes, width, seed=2)
    upstream = normal(rows, groups, width, seed=3, dtype=dtype)
    emulated, native = both(x, codebook, metric, upstream)
    assert_same(emulated, native)
    wide = leaves(x.double(), codebook.double())
    parts = [
        frozen_quantize([wide[0][:, g]], [wide[1][g]], emulated[1][:, g], metric, **WEIGHTS) for g in range(groups)
    ]
    values, loss = (
        torch.stack([p[0] for p in parts], 1),
        sum(p[1] for p in parts) / groups if rows else emulated[2] * 0.0,
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_near(emulated[0], values, tolerance, "quantized")
    assert_near(emulated[2], loss, 1e-5, "loss")
    if rows:
        exact = torch.autograd.grad((values, loss), wide, (upstream.double(), torch.tensor(3.0, dtype=torch.float64)))
        assert_gradients(emulated[3:], exact, tolerance)


@pytest.mark.parametrize("metric", METRICS)
def test_every_schedule(metric, schedule):
    """Several blocks, a popular code in chunks; x of one group after the other in memory."""
    x, codebook = normal(1300, 2, 5, seed=1), normal(2, 40, 5, seed=2)
    codebook[0, 1:] += 1e3 if metric == "l2" else 0  # all rows of the first group choose its first code
    emulated, native = both(x, codebook, metric, normal(1300, 2, 5, seed=3))
    assert metric != "l2" or not emulated[1][:, 0].any()
    assert_same(emulated[:4], native[:4])
    assert_near(emulated[4], native[4], 1e-6)


def test_the_loss_of_many_blocks():
    x = normal(9000, 1, 1, seed=1)
    emulated = quantize(x, torch.tensor([[[-0.5], [0.5]]]), metric="l2", backend="emulated")
    exact = (x.double().abs() - 0.5).square().mean() * 1.25
    assert_near(emulated.loss, exact, 1.2e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", HALVES)
def test_everything_the_kernel_writes(metric, dtype, core, guarded):
    """Slices [1:] in, outputs amid guards; without what is not wanted, the rest is the same."""
    x, codebook = normal(42, 2, 9, seed=1, dtype=dtype)[1:], normal(3, 31, 9, seed=2)[1:]
    tables, total, left_out = tables_of([9], [1.0], metric), 1.9, torch.zeros(2, dtype=torch.int64)
    made = outputs(guarded, x, codebook, tables)
    core.quantize(x, codebook, tables, total, *made.values(), -1, 0, left_out)
    out, _, _ = quantize_and_count(x, codebook, NOTHING, metric=metric, **WEIGHTS, backend="native")
    assert same_bits(made["quantized"], out.quantized) and torch.equal(made["indices"], out.indices)
    assert_near(made["loss"], out.loss, 1.2e-7)
    unit = metric == "cosine"
    rows = codebook[torch.arange(2), out.indices]
    norms = rows.double().norm(dim=-1, keepdim=True) if unit else torch.ones(41, 2, 1)
    assert_near(made["code_norms"], norms, 1e-6)
    assert same_bits(made["code_rows"], rows / made["code_norms"])
    wide = x.float()
    expected = wide.double() / wide.double().norm(dim=-1, keepdim=True) if unit else wide
    assert_near(made["searched"], expected, 1e-6)
    few = outputs(guarded, x, codebook, tables, **NONE)
    core.quantize(x, codebook, tables, total, *few.values(), -1, 0, None)
    assert all(same_bits(few[name], made[name]) for name in FORWARD[:3]) and left_out.tolist() == [0, 0]


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_that_are_not_asked_for(metric, core, guarded):
    """Each of the gradients in and out may be absent; the others do not change."""
    x, codebook = normal(42, 2, 9, seed=1)[1:], normal(2, 31, 9, seed=2)
    tables = tables_of([9], [1.0], metric)
    made = outputs(guarded, x, codebook, tables)
    core.quantize(x, codebook, tables, 1.9, *made.values(), -1, 0, None)
    upstream, loss = normal(41, 2, 9, seed=3), torch.tensor(3.0)

    def backward(quantized, loss, wants_x=True, wants_codebook=True):
        grad_x, grad_codebook = guarded(41, 2, 9, shift=1), guarded(2, 31, 9, shift=1)
        core.quantize_backward(
            x, made["code_rows"], made["code_norms"], made["indices"], quantized, loss, tables, 0.4, 1.5,
            grad_x if wants_x else None, grad_codebook if wants_codebook else None, -1, 0, None,
        )  # fmt: skip
        return grad_x, grad_codebook

    grad_x, grad_codebook = backward(upstream, loss)
    assert same_bits(backward(upstream, loss, wants_codebook=False)[0], grad_x)
    assert same_bits(backward(None, loss, wants_x=False)[1], grad_codebook)
    (from_loss, _), (straight, nothing) = backward(None, loss), backward(upstream, None)
    assert_near(from_loss + straight, grad_x, 1e-6)
    assert not nothing.any() and (metric == "cosine" or same_bits(straight, upstream))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(metric, bad, schedule):
    """They get id 0 and NaN, no gradient, and no part of the loss but in its denominator; they are counted."""
    x, codebook = normal(70, 2, 11, seed=1), normal(2, 20, 11, seed=2)
    x[3, 0, 10] = x[66, 1, 0] = bad
    left_out = ~x.isfinite().all(-1)
    counts(-1).zero_()
    with pytest.warns(RuntimeWarning, match="2 rows"):  # the CPU's kernels
        emulated, native = both(x, codebook, metric, normal(70, 2, 11, seed=3))
    assert counts(-1).tolist() == [0, 2]
    counts(-1).zero_()
    assert_same(emulated, native)
    assert emulated[0][left_out].isnan().all() and not emulated[1][left_out].any()
    assert not emulated[3][left_out].any() and emulated[4].isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_codes_and_rows_without_a_direction(metric):
    """Zeros, NaN codes, and codebooks of nothing but NaN."""
    x, codebook = normal(40, 3, 7, seed=1), normal(3, 9, 7, seed=2)
    x[::5], codebook[0, 4], codebook[0, 2, 1], codebook[1], codebook[2, 3:] = (
        0,
        0,
        torch.nan,
        torch.nan,
        codebook[2, :1],
    )
    emulated, native = both(x, codebook, metric, normal(40, 3, 7, seed=3))
    for name, a, b in zip(("quantized", "indices", "grad_x"), emulated[:2] + emulated[3:4], native[:2] + native[3:4]):
        assert torch.equal(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(), b.nan_to_num()), name
    assert same_bits(emulated[4], native[4]) and not emulated[1][:, 1].any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", HALVES)
def test_tables_that_share_an_index(metric, dtype):
    """Each table is unit by itself; widths that eight does not divide."""
    widths = (32, 8, 5, 1)
    results = []
    for backend in ("emulated", "native"):
        inputs = leaves(
            *(normal(50, w, seed=w, dtype=dtype) for w in widths), *(normal(99, w, seed=50 + w) for w in widths)
        )
        out = shared_quantize(inputs[:4], inputs[4:], metric=metric, weights=(1, 0.3, 2, 0), **WEIGHTS, backend=backend)
        value = sum((q.float() * (i + 1)).sum() for i, q in enumerate(out.quantized)) + 3 * out.loss
        results.append((*out.quantized, out.indices, *torch.autograd.grad(value, inputs), out.loss))
    assert all(same_bits(a, b) for a, b in zip(results[0][:-1], results[1][:-1]))
    assert_near(results[0][-1], results[1][-1], 1.2e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("statistics", [HITS, SUMS])
@pytest.mark.parametrize("dtype", HALVES)
def test_statistics_of_a_training_step(metric, statistics, dtype):
    x, codebook = normal(300, 2, 9, seed=1, dtype=dtype), normal(2, 50, 9, seed=2)
    x[7, 1, 2] = torch.nan
    counts(-1).zero_()
    options = {"metric": metric, **WEIGHTS}
    emulated = quantize_and_count(x, codebook, statistics, **options, backend="emulated")
    with pytest.warns(RuntimeWarning, match="1 rows"):
        native = quantize_and_count(x, codebook, statistics, **options, backend="native")
    assert counts(-1).tolist() == [0, 1], "once, though two kernels meet the row"
    counts(-1).zero_()
    assert same_bits(emulated[0].quantized, native[0].quantized)
    assert same_bits(emulated[1], native[1])
    assert (emulated[2] is native[2] is None) if statistics == HITS else same_bits(emulated[2], native[2])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 200), codes=st.integers(1, 200), width=st.integers(1, 40), groups=st.integers(1, 3),
    seed=st.integers(0, 99), metric=st.sampled_from(METRICS), dtype=st.sampled_from(HALVES),
    commitment=st.floats(0, 4), codebook_weight=st.floats(0, 4),
)  # fmt: skip
def test_any_shape(rows, codes, width, groups, seed, metric, dtype, commitment, codebook_weight):
    x, codebook = normal(rows, groups, width, seed=seed, dtype=dtype), normal(groups, codes, width, seed=seed + 1)
    weights = {"commitment_weight": commitment, "codebook_weight": codebook_weight}
    assert_same(*both(x, codebook, metric, normal(rows, groups, width, seed=seed + 2, dtype=dtype), **weights))


def test_float64_and_half_codebooks_are_refused(core, guarded):
    x, codebook, tables = normal(3, 1, 2), normal(1, 4, 2), tables_of([2], [1.0], "l2")
    made = outputs(guarded, x, codebook, tables)
    for a, b in ((x.double(), codebook), (x, codebook.half())):
        with pytest.raises(
            ValueError, match="quantize: wanted x of float32, float16 or bfloat16 and a codebook of float32"
        ):
            core.quantize(a, b, tables, 1.0, *made.values(), -1, 0, None)
    wide = normal(3, 1, 2, dtype=torch.float64)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="quantize_backward: x: wanted contiguous float32"):
        core.quantize_backward(wide, x, None, ids, None, None, tables, 1.0, 1.0, wide, None, -1, 0, None)
