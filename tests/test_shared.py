"""shared_nearest_code and shared_quantize: several tables under one index."""

import numpy as np
import pytest
import torch
from harness import (
    METRICS,
    assert_gradients,
    assert_near,
    assert_sentence,
    canonical_scores,
    compiled,
    frozen_quantize,
    leaves,
    near_ties,
    normal,
    opcheck,
    same_bits,
    with_threads,
)  # fmt: skip

from tokenflow_ext import ops, reference
from tokenflow_ext.ops import lookup, nearest_code, normalize_rows, shared_nearest_code, shared_quantize

TABLES = [((32, 8), None), ((32, 8), (1.0, 4.0)), ((1, 5, 2), (0.3, 0.0, 2.5)), ((7,), (3.0,)), ((3,) * 16, None)]


def problem(widths, rows=130, codes=333, dtype=torch.float32):
    """xs [rows, D_t] and codebooks [codes, D_t]."""
    xs = [normal(rows, width, seed=10 + t, dtype=dtype) for t, width in enumerate(widths)]
    return xs, [normal(codes, width, seed=50 + t, dtype=dtype) for t, width in enumerate(widths)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("widths", "weights"), TABLES)
def test_ids_of_the_twin(widths, weights, metric):
    xs, codebooks = problem(widths)
    found = shared_nearest_code(xs, codebooks, metric=metric, weights=weights, backend="native")
    wide = [[t.double() for t in part] for part in (xs, codebooks)]
    near_ties(
        found, reference.shared_nearest_code(*wide, metric=metric, weights=weights), xs, codebooks, metric, weights
    )
    near_ties(
        found,
        reference.shared_nearest_code(xs, codebooks, metric=metric, weights=weights),
        xs,
        codebooks,
        metric,
        weights,
    )
    exact = canonical_scores([x[:40] for x in xs], codebooks, metric, weights)
    assert np.array_equal(found[:40].numpy(), exact.argmin(1))


def test_ids_minimise_the_weighted_sum_of_distances():
    """The definition of api.md, term by term: weights[t] (2 - 2 cos), |x - c|^2 or -x.c."""
    xs, codebooks = problem((4, 3), rows=50, codes=60, dtype=torch.float64)
    weights = (0.7, 2.0)
    unit = torch.nn.functional.normalize
    distances = {
        "cosine": lambda x, c: 2 - 2 * unit(x, dim=-1) @ unit(c, dim=-1).T,
        "l2": lambda x, c: torch.cdist(x, c).square(),
        "dot": lambda x, c: -x @ c.T,
    }
    for metric, distance in distances.items():
        total = sum(w * distance(x, c) for w, x, c in zip(weights, xs, codebooks))
        found = shared_nearest_code(xs, codebooks, metric=metric, weights=weights, backend="native")
        near_ties(found, total.argmin(1), [x.float() for x in xs], [c.float() for c in codebooks], metric, weights)


def test_one_table_is_the_plain_search():
    (x,), (codebook,) = problem((9,))
    for metric in METRICS:
        assert torch.equal(
            shared_nearest_code([x], [codebook], metric=metric), nearest_code(x, codebook, metric=metric)
        )


def test_cosine_is_the_default():
    xs, codebooks = problem((32, 8))
    assert torch.equal(
        shared_nearest_code(xs, codebooks), shared_nearest_code(xs, codebooks, metric="cosine", weights=(1, 1))
    )
    assert torch.equal(shared_quantize(xs, codebooks).indices, shared_nearest_code(xs, codebooks))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("widths", "weights"), TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(widths, weights, metric, dtype):
    """Against autograd of the frozen surrogate in float64, and against the twin."""
    xs, codebooks = problem(widths, dtype=dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    inputs = leaves(*xs, *codebooks)
    x, c = inputs[: len(widths)], inputs[len(widths) :]
    options = {"metric": metric, "commitment_weight": 0.4, "codebook_weight": 1.5}
    out = shared_quantize(x, c, weights=weights, **options, backend="native")
    assert torch.equal(
        out.indices, shared_nearest_code(xs, codebooks, metric=metric, weights=weights, backend="native")
    )
    assert out.loss.shape == () and out.loss.dtype == dtype
    for value, codebook, row in zip(out.quantized, codebooks, xs):
        code = lookup(out.indices, codebook)
        assert same_bits(value, normalize_rows(code) if metric == "cosine" else code) and value.shape == row.shape
    wide = leaves(*(t.double() for t in inputs))
    quantized, loss = frozen_quantize(wide[: len(widths)], wide[len(widths) :], out.indices, **options)
    upstream = normal(*quantized.shape, seed=3, dtype=torch.float64)
    assert_near(torch.cat(out.quantized, -1), quantized, tolerance, "quantized")
    assert_near(out.loss, loss, tolerance, "loss")
    total = (torch.cat(out.quantized, -1) * upstream.to(dtype)).sum() + 3 * out.loss
    gradients = torch.autograd.grad(total, inputs)
    expected = torch.autograd.grad((quantized * upstream).sum() + 3 * loss, wide)
    assert_gradients(gradients, expected, 4 * tolerance)
    twin_out = reference.shared_quantize(wide[: len(widths)], wide[len(widths) :], weights=weights, **options)
    if near_ties(out.indices, twin_out.indices, xs, codebooks, metric, weights) == 0:
        assert_near(twin_out.loss, loss, 1e-13)
        total = (torch.cat(twin_out.quantized, -1) * upstream).sum() + 3 * twin_out.loss
        assert_gradients(torch.autograd.grad(total, wide), expected, 1e-12)


def test_weights_do_not_enter_the_loss():
    xs, codebooks = problem((6, 3))
    once = shared_quantize(xs, codebooks, weights=(1, 3), backend="native")
    twice = shared_quantize(xs, codebooks, weights=(2, 6), backend="native")
    assert torch.equal(once.indices, twice.indices) and same_bits(once.loss, twice.loss)


def test_a_table_of_weight_zero_is_carried_along():
    xs, codebooks = problem((6, 3))
    found = shared_nearest_code(xs, codebooks, weights=(1, 0), backend="native")
    near_ties(found, nearest_code(xs[0], codebooks[0], metric="cosine"), xs[:1], codebooks[:1], "cosine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_are_searched_in_float32(dtype):
    xs, codebooks = problem((32, 8))
    half = leaves(*(x.to(dtype) for x in xs))
    tables = leaves(*codebooks)
    out = shared_quantize(half, tables, backend="native")
    full_rows, full_tables = leaves(*(x.float() for x in half)), leaves(*codebooks)
    full = shared_quantize(full_rows, full_tables, backend="native")
    assert torch.equal(out.indices, full.indices) and same_bits(out.loss, full.loss) and out.loss.dtype == torch.float32
    for a, b in zip(out.quantized, full.quantized):
        assert a.dtype == dtype and same_bits(a, b.to(dtype))
    upstream = [normal(*x.shape, seed=8, dtype=dtype) for x in xs]
    total = sum((q.float() * g.float()).sum() for q, g in zip(out.quantized, upstream)) + out.loss
    full_total = sum((q * g.float()).sum() for q, g in zip(full.quantized, upstream)) + full.loss
    gradients, expected = (
        torch.autograd.grad(t, i) for t, i in ((total, half + tables), (full_total, full_rows + full_tables))
    )
    for a, b in zip(gradients, expected):
        assert same_bits(a, b.to(a.dtype))


def test_threads_change_no_bit():
    xs, codebooks = problem((32, 8), rows=1000, codes=2000)

    def call():
        inputs = leaves(*xs, *codebooks)
        out = shared_quantize(inputs[:2], inputs[2:], weights=(1, 4), backend="native")
        return [
            *out.quantized,
            out.loss,
            *torch.autograd.grad(out.loss + sum(q.square().sum() for q in out.quantized), inputs),
        ]

    first, *others = with_threads((1, 2, 3, 8), call)
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other))


def test_shapes_views_and_empty_batches():
    xs, codebooks = problem((6, 3), rows=24)
    grid = [x.reshape(2, 3, 4, -1) for x in xs]
    out = shared_quantize(grid, codebooks, backend="native")
    flat = shared_quantize(xs, codebooks, backend="native")
    assert out.indices.shape == (2, 3, 4) and torch.equal(out.indices.flatten(), flat.indices)
    assert out.quantized[1].shape == (2, 3, 4, 3) and same_bits(out.loss, flat.loss)
    joined = torch.cat(grid, -1).movedim(-1, 1).contiguous().movedim(1, -1)
    views = shared_quantize(joined.split((6, 3), -1), [c.T.contiguous().T for c in codebooks], backend="native")
    assert torch.equal(views.indices, out.indices) and all(
        same_bits(a, b) for a, b in zip(views.quantized, out.quantized)
    )
    empty = shared_quantize([x[:0] for x in xs], codebooks, backend="native")
    assert empty.indices.shape == (0,) and empty.loss.item() == 0 and empty.quantized[0].shape == (0, 6)
    single = shared_quantize([x[0] for x in xs], codebooks, backend="native")
    assert single.indices.shape == () and single.indices == flat.indices[0]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_bad_channel_in_one_table_spoils_the_row(backend):
    xs, codebooks = problem((6, 3), rows=20)
    xs[1][4, 1] = float("nan")
    inputs = leaves(*xs, *codebooks)
    with pytest.warns(RuntimeWarning, match="1 rows"):
        out = shared_quantize(inputs[:2], inputs[2:], backend=backend)
    assert out.indices[4] == 0 and all(q[4].isnan().all() for q in out.quantized)
    rest = [i for i in range(20) if i != 4]
    clean_inputs = leaves(*(x[rest] for x in xs), *codebooks)
    clean = shared_quantize(clean_inputs[:2], clean_inputs[2:], backend=backend)
    assert_near(out.loss * 20, clean.loss * 19, 1e-6, "loss")
    spoiled = torch.autograd.grad(out.loss * 20, inputs)
    expected = torch.autograd.grad(clean.loss * 19, clean_inputs)
    for a, b in zip(spoiled[:2], expected[:2]):
        assert not a[4].any()
        assert_near(a[rest], b, 1e-5)
    for a, b in zip(spoiled[2:], expected[2:]):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", ["shared_nearest_code", "shared_quantize"])
def test_the_warning_of_a_bad_row_names_the_function(op, backend):
    xs, tables = [normal(3, 4), normal(3, 2).fill_(torch.nan)], [normal(5, 4), normal(5, 2)]
    with pytest.warns(RuntimeWarning, match=f"^{op}: 3 rows hold NaN"):
        getattr(ops, op)(xs, tables, backend=backend)


def test_opcheck():
    x, codebook = normal(9, 1, 9).requires_grad_(), normal(1, 20, 9).requires_grad_()
    opcheck("quantize", x, codebook, [6, 3], [1.0, 2.0], "cosine", 0.25, 1.0, True)
    opcheck("nearest_code", x[:, 0].detach(), codebook[0].detach(), "l2", 1, None, False, [6, 3], [1.0, 2.0])


def test_compile_forward_and_backward():
    xs, codebooks = problem((6, 3))

    def step(a, b, c, d):
        quantized, indices, loss = shared_quantize((a, b), (c, d), weights=(1.0, 2.0))
        return quantized[0].square().sum() + quantized[1].sum() + loss, indices

    inputs = leaves(*xs, *codebooks)
    value, indices = compiled(step)(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    expected, expected_indices = step(*inputs)
    assert torch.equal(indices, expected_indices)
    assert_near(value, expected, 1e-6)
    assert_gradients(gradients, torch.autograd.grad(expected, inputs), 1e-6)


XS, TABLES_7 = (torch.zeros(3, 4), torch.zeros(3, 2)), (torch.zeros(7, 4), torch.zeros(7, 2))
BAD = {
    "xs is a tensor": ("xs", TypeError, {"xs": XS[0]}),
    "codebooks is a tensor": ("codebooks", TypeError, {"codebooks": TABLES_7[0]}),
    "no tables": ("xs", ValueError, {"xs": (), "codebooks": ()}),
    "fewer rows than tables": ("xs", ValueError, {"xs": XS[:1]}),
    "17 tables": ("xs", ValueError, {"xs": XS[:1] * 17, "codebooks": TABLES_7[:1] * 17}),
    "integer rows": ("xs[1]", TypeError, {"xs": (XS[0], XS[1].long())}),
    "no tensor": ("xs[0]", TypeError, {"xs": ([1.0], XS[1])}),
    "two types": ("xs[1]", TypeError, {"xs": (XS[0], XS[1].double())}),
    "width": ("xs[1]", ValueError, {"xs": (XS[0], XS[0])}),
    "other rows": ("xs[1]", ValueError, {"xs": (XS[0], XS[1][:2])}),
    "other K": ("codebooks[1]", ValueError, {"codebooks": (TABLES_7[0], TABLES_7[1][:6])}),
    "rank": ("codebooks[0]", ValueError, {"codebooks": (torch.zeros(1, 7, 4), TABLES_7[1])}),
    "integer table": ("codebooks[0]", TypeError, {"codebooks": (TABLES_7[0].long(), TABLES_7[1])}),
    "device": ("codebooks[1]", ValueError, {"codebooks": (TABLES_7[0], TABLES_7[1].to("meta"))}),
    "weights count": ("weights", ValueError, {"weights": (1.0,)}),
    "negative weight": ("weights", ValueError, {"weights": (1.0, -1.0)}),
    "nan weight": ("weights", ValueError, {"weights": (1.0, float("nan"))}),
    "weights a number": ("weights", TypeError, {"weights": 2.0}),
    "weights a word": ("weights", TypeError, {"weights": ("a", "b")}),
    "metric": ("metric", ValueError, {"metric": "cos"}),
    "backend": ("backend", ValueError, {"backend": "cuda"}),
}
LOSS = {
    "commitment": ("commitment_weight", ValueError, {"commitment_weight": -1}),
    "commitment kind": ("commitment_weight", TypeError, {"commitment_weight": "a"}),
    "codebook": ("codebook_weight", ValueError, {"codebook_weight": float("nan")}),
    "codebook kind": ("codebook_weight", TypeError, {"codebook_weight": None}),
}


@pytest.mark.parametrize("op", ["shared_nearest_code", "shared_quantize"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, op):
    argument, error, change = BAD[case]
    arguments = {"xs": XS, "codebooks": TABLES_7, "backend": "native", **change}
    assert_sentence(
        error, op, argument, lambda: getattr(ops, op)(arguments.pop("xs"), arguments.pop("codebooks"), **arguments)
    )


@pytest.mark.parametrize("case", LOSS)
def test_bad_loss_weights(case):
    argument, error, change = LOSS[case]
    assert_sentence(error, "shared_quantize", argument, ops.shared_quantize, XS, TABLES_7, **change)
