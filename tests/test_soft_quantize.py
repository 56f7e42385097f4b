"""soft_quantize against its twin in float64, the published index propagation's numbers, and the edges of api.md."""

import math

import pytest
import torch
from golden_values import Case
from harness import (
    FLOATS,
    assert_gradients,
    assert_near,
    assert_sentence,
    compiled,
    leaves,
    near_ties,
    normal,
    opcheck,
    same_bits,
    with_threads,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import reference
from tokenflow_ext.ops import lookup, nearest_code, soft_quantize

SHAPES = [(1, 1, 1, 1), (7, 1, 3, 2), (67, 33, 1, 5), (130, 100, 8, 8), (300, 1500, 40, 24)]


def inputs(rows, codes, width, out, dtype=torch.float32, scale=1.0):
    """x, keys, values, bias and an upstream gradient."""
    shapes = (rows, width), (codes, width), (codes, out), (codes,), (rows, out)
    *arguments, upstream = (normal(*shape, seed=seed, dtype=dtype) * scale for seed, shape in enumerate(shapes, 1))
    return *leaves(*arguments), upstream


def step(function, x, keys, values, bias, upstream, **options):
    """quantized, ids, and the gradients of all arguments."""
    out = function(x, keys, values, bias=bias, **options)
    arguments = [x, keys, values] + ([] if bias is None else [bias])
    return *out, torch.autograd.grad(out[0], arguments, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize(("rows", "codes", "width", "out"), SHAPES)
def test_values_and_gradients(rows, codes, width, out, scale, with_bias, dtype):
    x, keys, values, bias, upstream = inputs(rows, codes, width, out, dtype)
    bias = bias if with_bias else None
    quantized, ids, gradients = step(soft_quantize, x, keys, values, bias, upstream, scale=scale, backend="native")
    table = keys if bias is None else torch.cat([keys, bias[:, None]], -1)
    rows_searched = scale * x if bias is None else torch.cat([scale * x, torch.ones_like(x[:, :1])], -1)
    assert torch.equal(ids, nearest_code(rows_searched, table, metric="dot", backend="native"))
    assert same_bits(quantized, lookup(ids, values))
    wide = leaves(*(t.double() for t in (x, keys, values))), None if bias is None else leaves(bias.double())[0]
    _, expected_ids, expected = step(reference.soft_quantize, *wide[0], wide[1], upstream.double(), scale=scale)
    if near_ties(ids, expected_ids, [rows_searched], [table], "dot"):
        expected = (*expected[:2], gradients[2], *expected[3:])
    assert_gradients(gradients, expected, 2e-5 if dtype == torch.float32 else 1e-12)


def test_gradcheck_of_the_softmax():
    """Backward is that of sum_k p_k values_k with the values constant; theirs is the gather's."""
    x, keys, values, bias, upstream = inputs(6, 37, 3, 4, torch.float64)
    _, ids, gradients = step(soft_quantize, x, keys, values, bias, upstream, scale=0.8, backend="native")
    inner = lambda x, k, b: (0.8 * x @ k.T + b).softmax(-1) @ values.detach()  # noqa: E731
    soft = torch.autograd.grad(inner(x, keys, bias), (x, keys, bias), upstream)
    assert_gradients((*gradients[:2], gradients[3]), soft, 1e-13)
    expected = torch.zeros_like(values).index_add_(0, ids, upstream)
    assert_near(gradients[2], expected, 1e-15)


def test_one_table_for_both():
    """IBQ: the codebook gets the softmax's gradient as keys and the gather's as values."""
    x, codebook, _, _, _ = inputs(50, 70, 6, 6)
    (wide, wide_x), upstream = leaves(codebook.double(), x.double()), normal(50, 6, seed=9)
    (found,) = torch.autograd.grad(soft_quantize(x, codebook, codebook, backend="native")[0], codebook, upstream)
    (exact,) = torch.autograd.grad(reference.soft_quantize(wide_x, wide, wide)[0], wide, upstream.double())
    assert_near(found, exact, 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_types(dtype):
    x, keys, values, bias, upstream = inputs(40, 50, 6, 5, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    quantized, ids, gradients = step(soft_quantize, x, keys, values, bias, upstream, backend="native")
    upcast = [*leaves(*(t.to(wide) for t in (x, keys, values, bias))), upstream.to(wide)]
    expected, expected_ids, exact = step(soft_quantize, *upcast, backend="native")
    assert quantized.dtype == dtype and torch.equal(ids, expected_ids) and same_bits(quantized, expected.to(dtype))
    assert all(same_bits(a, b.to(dtype)) for a, b in zip(gradients, exact))


def test_ties_go_to_the_lowest_id():
    keys = normal(5, 8, seed=2)[torch.tensor([4, 0, 1, 2, 3] * 20)]
    _, ids = soft_quantize(normal(200, 8, seed=1), keys, normal(100, 3), backend="native")
    assert (ids < 5).all()


def test_threads_do_not_change_a_bit():
    arguments = inputs(600, 3000, 8, 9)

    def run():
        quantized, ids, gradients = step(soft_quantize, *arguments, backend="native")
        return quantized, ids, *gradients

    first, *others = with_threads((1, 2, 3, 8, 64), run)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other))


def test_rows_do_not_depend_on_the_batch():
    x, keys, values, bias, upstream = inputs(600, 300, 8, 9)
    whole = step(soft_quantize, x, keys, values, bias, upstream, backend="native")
    (part,) = leaves(x[290:300])
    alone = step(soft_quantize, part, keys, values, bias, upstream[290:300], backend="native")
    assert same_bits(whole[0][290:300], alone[0]) and same_bits(whole[2][0][290:300], alone[2][0])


def test_rows_and_codes_that_are_not_finite():
    x, keys, values, bias, upstream = (t.detach() for t in inputs(70, 90, 6, 4))
    x[3, 2], x[60, 0] = torch.nan, torch.inf
    keys[5, 1], values[80, 2], bias[81] = torch.nan, torch.inf, -torch.inf
    rows, codes = [i for i in range(70) if i not in (3, 60)], [k for k in range(90) if k not in (5, 80, 81)]
    kept = [*leaves(x[rows], keys[codes], values[codes], bias[codes]), upstream[rows]]
    for backend in ("native", "reference"):
        with pytest.warns(RuntimeWarning, match="soft_quantize: 2 rows hold NaN or inf"):
            quantized, ids, gradients = step(soft_quantize, *leaves(x, keys, values, bias), upstream, backend=backend)
        expected, expected_ids, exact = step(soft_quantize, *kept, backend=backend)
        assert quantized[[3, 60]].isnan().all() and not ids[[3, 60]].any()
        assert same_bits(quantized[rows], expected) and torch.equal(ids[rows], torch.tensor(codes)[expected_ids])
        assert not gradients[0][[3, 60]].any() and not any(g[[5, 80, 81]].any() for g in gradients[1:])
        assert_near(gradients[0][rows], exact[0], 1e-5)
        for a, b in zip(gradients[1:], exact[1:]):
            assert_near(a[codes], b, 1e-5)


def test_empty_batch():
    x, keys, values, bias, upstream = inputs(0, 5, 4, 3)
    quantized, ids, gradients = step(soft_quantize, x, keys, values, bias, upstream, backend="native")
    assert quantized.shape == (0, 3) and ids.shape == (0,) and not any(g.any() for g in gradients)


def test_shapes_and_views():
    x, keys, values = normal(8, 60, seed=1).T, normal(3, 8, 50, seed=2)[1].T, normal(5, 50, seed=3).T
    quantized, ids = soft_quantize(x.reshape(3, 4, 5, 8), keys, values, backend="native")
    flat, flat_ids = soft_quantize(x.contiguous(), keys.contiguous(), values.contiguous(), backend="native")
    assert quantized.shape == (3, 4, 5, 5) and ids.shape == (3, 4, 5)
    assert same_bits(quantized.reshape(60, 5), flat) and torch.equal(ids.reshape(60), flat_ids)
    single, one_id = soft_quantize(x[0], keys, values, backend="native")
    assert same_bits(single, flat[0]) and one_id == flat_ids[0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), codes=st.integers(1, 80), width=st.integers(1, 20), out=st.integers(1, 20),
    scale=st.floats(-20, 20), seed=st.integers(0, 9),
)  # fmt: skip
def test_gradients_of_the_logits_cancel(rows, codes, width, out, scale, seed):
    """sum_k d loss / d s_nk = 0, so the biases' gradients sum to 0; equal values send nothing through the softmax."""
    x, keys = normal(rows, width, seed=seed), normal(codes, width, seed=seed + 50)
    (bias,), values = leaves(normal(codes, seed=seed + 100)), normal(codes, out, seed=seed + 150)
    upstream = normal(rows, out, seed=seed + 200)
    quantized, _ = soft_quantize(x, keys, values, scale=scale, bias=bias, backend="native")
    (gradient,) = torch.autograd.grad(quantized, bias, upstream)
    size = upstream.abs().sum() * values.abs().max()
    assert gradient.isfinite().all() and gradient.sum().abs() <= 2e-6 * size
    quantized, _ = soft_quantize(x, keys, values[:1].expand(codes, out), scale=scale, bias=bias, backend="native")
    assert torch.autograd.grad(quantized, bias, upstream)[0].abs().max() <= 2e-6 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_of_large_logits_is_a_tie(dtype):
    """p = (1/2, 1/2, 0): dl = p (a - <a>) of the two, whatever the size of their logits."""
    x, keys = torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=dtype)
    values = torch.tensor([[3.0], [1.0], [7.0]], dtype=dtype)
    for scale in (1.0, 1e10, 1e20):
        (k,) = leaves(keys)
        quantized, ids = soft_quantize(x, k, values, scale=scale, backend="native")
        (gradient,) = torch.autograd.grad(quantized.sum(), k)
        rest = math.exp(-2) if scale == 1 else 0.0
        p = torch.tensor([1.0, 1.0, rest], dtype=torch.float64) / (2 + rest)
        expected = p * (values[:, 0].double() - (p * values[:, 0].double()).sum())
        assert ids == 0 and quantized == 3
        assert_near(gradient / scale, expected[:, None] * x.double(), 1e-6)


def test_second_derivative_raises():
    x, keys, values, _, _ = inputs(4, 5, 2, 2)
    quantized, _ = soft_quantize(x, keys, values, backend="native")
    (gradient,) = torch.autograd.grad(quantized.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="soft_quantize.*once"):
        torch.autograd.grad(gradient.sum(), x)


def test_only_what_is_wanted():
    x, keys, values, bias, upstream = inputs(40, 60, 8, 4)
    _, _, every = step(soft_quantize, x, keys, values, bias, upstream, backend="native")
    for i in range(4):
        arguments = [t if i == j else t.detach() for j, t in enumerate((x, keys, values, bias))]
        quantized, _ = soft_quantize(*arguments[:3], bias=arguments[3], backend="native")
        (alone,) = torch.autograd.grad(quantized, arguments[i], upstream)
        assert same_bits(alone, every[i])


def test_compiled_and_registered():
    x, keys, values, bias, upstream = inputs(20, 30, 4, 5)
    run = lambda *a: soft_quantize(*a[:3], bias=a[3], scale=0.5, backend="native")  # noqa: E731
    found, expected = compiled(run)(x, keys, values, bias), run(x, keys, values, bias)
    assert all(same_bits(a, b) for a, b in zip(found, expected))
    gradients = (torch.autograd.grad(out[0], (x, keys, values, bias), upstream) for out in (found, expected))
    assert all(same_bits(a, b) for a, b in zip(*gradients))
    opcheck("soft_quantize", *leaves(x[:, None], keys[None], values[None]), torch.ones(20, 1, dtype=torch.bool))


BAD = {
    "x": (ValueError, {"x": torch.zeros(3, 5)}),
    "x type": (TypeError, {"x": torch.zeros(3, 4).long()}),
    "keys": (ValueError, {"keys": torch.zeros(0, 4)}),
    "values": (ValueError, {"values": torch.zeros(5, 2)}),
    "values type": (TypeError, {"values": None}),
    "scale": (ValueError, {"scale": float("inf")}),
    "bias": (ValueError, {"bias": torch.zeros(5)}),
    "backend": (ValueError, {"backend": "cuda"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, change = BAD[name]
    call = {"x": torch.zeros(3, 4), "keys": torch.zeros(6, 4), "values": torch.zeros(6, 2), **change}
    assert_sentence(error, "soft_quantize", name.split()[0], soft_quantize, **call)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ["ibq/small", "ibq/wide", "ibq/no_entropy"])
def test_published_index_propagation(name, backend):
    case = Case("related_quantizers", name)
    z, codebook = leaves(case["z"], case["codebook"])
    quantized, indices = soft_quantize(z.movedim(1, -1), codebook, codebook, backend=backend)
    case.check_indices(indices)
    case.check("value", quantized.movedim(-1, 1), case["z_q"])
    gradients = torch.autograd.grad((quantized.movedim(-1, 1) * case["upstream"]).sum(), (z, codebook))
    for gradient, key in zip(gradients, ("grad_z_out", "grad_codebook_out")):
        case.check("gradient", gradient, case[key])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_published_quantization_loss(backend):
    """The double quantization loss of IBQ, gradient through the soft codes included."""
    for name in ("ibq/small", "ibq/wide"):
        case = Case("related_quantizers", name)
        z, codebook = leaves(case["z"], case["codebook"])
        x = z.movedim(1, -1)
        soft, indices = soft_quantize(x, codebook, codebook, backend=backend)
        hard = lookup(indices, codebook, backend=backend)
        loss = (soft - x).square().mean() + (hard.detach() - x).square().mean()
        loss = loss + case.options["beta"] * (hard - x.detach()).square().mean()
        assert abs(loss.item() - case.scalars["quant_loss"]) <= 1e-5
        for gradient, key in zip(torch.autograd.grad(loss, (z, codebook)), ("grad_z_loss", "grad_codebook_loss")):
            case.check("gradient", gradient, case[key])
