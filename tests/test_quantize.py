"""quantize against its twin, the frozen surrogate in float64, and the edges of api.md."""

import copy

import pytest
import torch
from harness import (
    FLOATS,
    METRICS,
    assert_gradients,
    assert_near,
    assert_sentence,
    compiled,
    frozen_quantize,
    group_near_ties,
    leaves,
    normal,
    opcheck,
    same_bits,
    with_threads,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tokenflow_ext import ops, reference
from tokenflow_ext.ops import lookup, nearest_code, normalize_rows, quantize

SHAPES = [(1, 1, 1), (7, 1, 3), (67, 33, 1), (130, 100, 8), (200, 3000, 40)]


def code_values(indices, codebook, metric):
    """What `quantized` is made of: the looked-up code, unit for cosine, in the type that is computed in."""
    wide = codebook if codebook.dtype == torch.float64 else codebook.float()
    return normalize_rows(lookup(indices, wide)) if metric == "cosine" else lookup(indices, wide)


def by_hand(x, codebook, indices, metric, **weights):
    """The frozen surrogate over groups: ([N, G, D], 0-dim loss), the loss being the mean over rows, groups, channels."""
    if codebook.dim() == 2:
        return frozen_quantize([x], [codebook], indices, metric, **weights)
    parts = [frozen_quantize([x[:, g]], [c], indices[:, g], metric, **weights) for g, c in enumerate(codebook)]
    return torch.stack([p[0] for p in parts], 1), sum(p[1] for p in parts) / len(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "codes", "width"), SHAPES)
@pytest.mark.parametrize("groups", [0, 3])
def test_values_and_gradients(rows, codes, width, groups, metric, dtype):
    x_shape, c_shape = ((rows, groups, width), (groups, codes, width)) if groups else ((rows, width), (codes, width))
    x, codebook = leaves(normal(*x_shape, seed=1, dtype=dtype), normal(*c_shape, seed=2, dtype=dtype))
    weights = {"commitment_weight": 0.4, "codebook_weight": 1.5}
    out = quantize(x, codebook, metric=metric, **weights, backend="native")
    assert torch.equal(out.indices, nearest_code(x, codebook, metric=metric, backend="native"))
    assert same_bits(out.quantized, code_values(out.indices, codebook, metric))
    assert out.loss.shape == () and out.loss.dtype == dtype

    wide = leaves(x.double(), codebook.double())
    quantized, loss = by_hand(*wide, out.indices, metric, **weights)
    upstream = normal(*x_shape, seed=3, dtype=torch.float64)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    assert_near(out.quantized, quantized, tolerance, "quantized")
    assert_near(out.loss, loss, tolerance, "loss")
    gradients = torch.autograd.grad((out.quantized * upstream.to(dtype)).sum() + 3 * out.loss, (x, codebook))
    expected = torch.autograd.grad((quantized * upstream).sum() + 3 * loss, wide)
    # A unit vector of one channel is a constant: its gradient is rounding of terms of size 1 / |x|.
    size = float(torch.cat([x.flatten(), codebook.flatten()]).detach().abs().reciprocal().max()) if width == 1 else 0.0
    assert_gradients(gradients, expected, 4 * tolerance, size)

    twin = reference.quantize(*wide, metric=metric, **weights)
    if group_near_ties(out.indices, twin.indices, x, codebook, metric) == 0:
        assert_near(twin.loss, loss, 1e-13, "the twin's loss")
        assert_near(twin.quantized, quantized, 1e-13, "the twin's value")
        assert_gradients(
            torch.autograd.grad((twin.quantized * upstream).sum() + 3 * twin.loss, wide), expected, 1e-12, size
        )


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck_of_the_surrogate(metric):
    """The op's float64 gradient is that of the frozen surrogate, whose autograd gradcheck confirms."""
    x, codebook = leaves(normal(6, 3, seed=1, dtype=torch.float64), normal(5, 3, seed=2, dtype=torch.float64))
    out = quantize(x, codebook, metric=metric, backend="native")
    at = ([x.detach().clone()], [codebook.detach().clone()])
    surrogate = lambda a, b: frozen_quantize([a], [b], out.indices, metric, at=at)  # noqa: E731
    assert torch.autograd.gradcheck(surrogate, (x, codebook))
    for a, b in zip((out.quantized.square().sum(), out.loss), surrogate(x, codebook)):
        b = b.square().sum() if b.dim() else b
        assert_gradients(
            torch.autograd.grad(a, (x, codebook), retain_graph=True, materialize_grads=True),
            torch.autograd.grad(b, (x, codebook), retain_graph=True, materialize_grads=True),
            1e-13,
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codebook_type", FLOATS)
@pytest.mark.parametrize("x_type", FLOATS)
def test_float_types(x_type, codebook_type, metric):
    """Half types are computed exactly as their upcast; only the outputs are rounded to the inputs' types."""
    x, codebook = leaves(normal(70, 8, seed=1, dtype=x_type), normal(50, 8, seed=2, dtype=codebook_type))
    real = torch.float64 if torch.float64 in (x_type, codebook_type) else torch.float32
    wide = leaves(x.to(real), codebook.to(real))
    out, full = quantize(x, codebook, metric=metric), quantize(*wide, metric=metric)
    assert torch.equal(out.indices, full.indices) and same_bits(out.loss, full.loss)
    assert out.loss.dtype == real and out.quantized.dtype == x_type
    assert same_bits(out.quantized, full.quantized.to(x_type))
    upstream = normal(70, 8, seed=3, dtype=x_type)
    gradients = torch.autograd.grad((out.quantized, out.loss), (x, codebook), (upstream, torch.tensor(2.0, dtype=real)))
    expected = torch.autograd.grad(
        (full.quantized, full.loss), wide, (upstream.to(real), torch.tensor(2.0, dtype=real))
    )
    assert same_bits(gradients[0], expected[0].to(x_type)) and same_bits(gradients[1], expected[1].to(codebook_type))


def test_the_codebook_learns_from_the_loss_alone():
    x, codebook = leaves(normal(9, 4, seed=1), normal(5, 4, seed=2))
    out = quantize(x, codebook, backend="native")
    (from_quantized,) = torch.autograd.grad(out.quantized.sum(), codebook, retain_graph=True, materialize_grads=True)
    assert not from_quantized.any()
    (from_loss,) = torch.autograd.grad(out.loss, codebook, retain_graph=True)
    assert from_loss[out.indices].abs().sum(-1).gt(0).all()
    unused = [k for k in range(5) if k not in out.indices]
    assert not from_loss[unused].any()
    only_commitment = quantize(x, codebook, codebook_weight=0.0, backend="native")
    (none,) = torch.autograd.grad(only_commitment.loss, codebook, materialize_grads=True)
    assert not none.any()


@pytest.mark.parametrize("needs", ["x", "codebook"])
def test_gradient_of_one_input_alone(needs):
    x, codebook = normal(9, 4, seed=1), normal(5, 4, seed=2)
    both = leaves(x, codebook)
    expected = torch.autograd.grad(quantize(*both, backend="native").loss, both)
    (leaf,) = leaves(x if needs == "x" else codebook)
    out = quantize(leaf, codebook, backend="native") if needs == "x" else quantize(x, leaf, backend="native")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert same_bits(gradient, expected[0 if needs == "x" else 1])


@pytest.mark.parametrize("metric", METRICS)
def test_threads_and_order_change_nothing(metric):
    x, codebook = normal(1000, 8, seed=1), normal(2100, 8, seed=2)

    def call(x=x):
        a, c = leaves(x, codebook)
        out = quantize(a, c, metric=metric, backend="native")
        gradients = torch.autograd.grad((out.quantized * x).sum() + out.loss, (a, c))
        return [out.quantized, out.indices, out.loss, *gradients]

    first, *others = with_threads((1, 2, 3, 8), call)
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other))
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    shuffled = call(x[order])
    assert same_bits(shuffled[0], first[0][order]) and torch.equal(shuffled[1], first[1][order])
    assert same_bits(shuffled[3], first[3][order])
    assert_near(shuffled[2], first[2], 1e-6, "loss")
    assert_near(shuffled[4], first[4], 1e-5, "codebook gradient")
    part = quantize(x[100:137], codebook, metric=metric, backend="native")
    assert same_bits(part.quantized, first[0][100:137]) and torch.equal(part.indices, first[1][100:137])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(bad, metric, backend):
    x, codebook = normal(70, 8, seed=1), normal(20, 8, seed=2)
    rest = [i for i in range(70) if i not in (3, 65)]
    clean_leaves = leaves(x[rest], codebook)
    x[3, 0] = x[65, 7] = bad
    spoiled_leaves = leaves(x, codebook)
    with pytest.warns(RuntimeWarning, match="2 rows"):
        out = quantize(*spoiled_leaves, metric=metric, backend=backend)
    clean = quantize(*clean_leaves, metric=metric, backend=backend)
    assert not out.indices[[3, 65]].any() and torch.equal(out.indices[rest], clean.indices)
    assert out.quantized[[3, 65]].isnan().all() and same_bits(out.quantized[rest], clean.quantized)
    assert_near(out.loss * 70, clean.loss * 68, 1e-6, "the denominator stays")
    weight = normal(70, 8, seed=5)
    kept = torch.where(out.quantized.isnan(), 0.0, out.quantized) * weight
    spoiled = torch.autograd.grad(kept.sum() + 70 * out.loss, spoiled_leaves)
    expected = torch.autograd.grad((clean.quantized * weight[rest]).sum() + 68 * clean.loss, clean_leaves)
    assert not spoiled[0][[3, 65]].any()
    assert_gradients((spoiled[0][rest], spoiled[1]), expected, 1e-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_nan_gradient_of_a_left_out_row_stays_out(backend):
    x, codebook = leaves(torch.tensor([[float("nan"), 1.0], [1.0, 2.0]]), normal(4, 2))
    with pytest.warns(RuntimeWarning):
        out = quantize(x, codebook, backend=backend)
    gradients = torch.autograd.grad(out.quantized.square().sum() + out.loss, (x, codebook))
    assert gradients[0].isfinite().all() and gradients[1].isfinite().all() and not gradients[0][0].any()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_only_rows_that_are_not_finite(backend):
    x, codebook = leaves(torch.full((3, 2), float("nan")), normal(4, 2))
    with pytest.warns(RuntimeWarning):
        out = quantize(x, codebook, backend=backend)
    assert out.loss.item() == 0 and out.quantized.isnan().all() and not out.indices.any()
    assert not any(g.any() for g in torch.autograd.grad(out.loss, (x, codebook)))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("metric", METRICS)
def test_nan_codes_are_never_chosen(metric, backend):
    x, codebook = leaves(normal(30, 8, seed=1), normal(50, 8, seed=2))
    with torch.no_grad():
        codebook[::2, 5] = float("nan")
    out = quantize(x, codebook, metric=metric, backend=backend)
    assert (out.indices % 2 == 1).all() and out.quantized.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.loss + out.quantized.sum(), (x, codebook)))


@pytest.mark.parametrize("metric", METRICS)
def test_zero_rows_ties_and_zero_codes(metric):
    codebook = torch.zeros(3, 4)
    codebook[1:] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    a, c = leaves(x, codebook)
    out = quantize(a, c, metric=metric, backend="native")
    assert out.indices.tolist() == [0, 1]
    assert same_bits(out.quantized, codebook[out.indices])
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.loss, (a, c)))


def test_views_and_empty_batches():
    x, codebook = normal(8, 20, seed=1), normal(6, 60, seed=2).T
    view = x.T[:, 1:7]
    out, plain = (
        quantize(view, codebook, backend="native"),
        quantize(view.contiguous(), codebook.contiguous(), backend="native"),
    )
    assert same_bits(out.quantized, plain.quantized) and out.quantized.is_contiguous()
    a, c = leaves(torch.empty(0, 6), codebook)
    empty = quantize(a, c, backend="native")
    assert empty.quantized.shape == (0, 6) and empty.indices.shape == (0,) and empty.loss.item() == 0
    gradients = torch.autograd.grad(empty.loss + empty.quantized.sum(), (a, c))
    assert gradients[0].shape == (0, 6) and not gradients[1].any()
    one = quantize(view[3], codebook, backend="native")
    assert one.indices.shape == () and same_bits(one.quantized, out.quantized[3])
    upstream = normal(6, 20, seed=4).T
    a, b = leaves(view), leaves(view)
    (g,) = torch.autograd.grad(quantize(*a, codebook, backend="native").quantized, a, upstream)
    (h,) = torch.autograd.grad(quantize(*b, codebook, backend="native").quantized, b, upstream.contiguous())
    assert same_bits(g, h)


def test_second_derivatives_raise():
    x, codebook = leaves(normal(6, 3, seed=1), normal(5, 3, seed=2))
    out = quantize(x, codebook, backend="native")
    gradients = torch.autograd.grad(out.loss, (x, codebook), create_graph=True)
    with pytest.raises(RuntimeError, match="quantize.*once"):
        torch.autograd.grad(gradients[0].sum() + gradients[1].sum(), x)


def test_an_ema_step_between_forward_and_backward_changes_no_gradient():
    """Backward reads what forward saw, not the codebook that an EMA or an optimiser has moved since."""
    for metric in METRICS:
        for dtype in (torch.float32, torch.bfloat16):
            codebook = normal(5, 3, seed=2)
            (a,), (b,) = leaves(normal(30, 3, seed=1, dtype=dtype)), leaves(normal(30, 3, seed=1, dtype=dtype))
            moved, still = quantize(a, codebook, metric=metric), quantize(b, codebook.clone(), metric=metric)
            rows = a.detach().float()
            counts, sums = ops.code_statistics(rows, moved.indices, 5)
            ops.ema_update_(codebook, torch.ones(5), normal(5, 3, seed=2), counts, sums, decay=0.5, metric=metric)
            moved_grad, still_grad = (
                torch.autograd.grad(o.loss + o.quantized.float().square().sum(), i) for o, i in ((moved, a), (still, b))
            )
            assert same_bits(moved_grad[0], still_grad[0])


def test_checkpoint_gives_the_same_gradients():
    x, codebook = leaves(normal(30, 8, seed=1), normal(20, 8, seed=2))
    step = lambda a, c: sum(v.sum() for v in quantize(a.sin(), c)[::2])  # noqa: E731
    plain = torch.autograd.grad(step(x, codebook), (x, codebook))
    again = torch.autograd.grad(checkpoint(step, x, codebook, use_reentrant=False), (x, codebook))
    assert all(same_bits(a, b) for a, b in zip(plain, again))


def test_result_is_a_named_tuple():
    out = quantize(normal(3, 4), normal(5, 4))
    quantized, indices, loss = out
    assert out._fields == ("quantized", "indices", "loss") and indices.dtype == torch.int64
    assert not indices.requires_grad and type(copy.copy(out)) is type(out)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 150), codes=st.integers(1, 70), width=st.integers(1, 20), groups=st.integers(1, 3),
    metric=st.sampled_from(METRICS), seed=st.integers(0, 99), dtype=st.sampled_from(FLOATS),
    commitment=st.sampled_from([0.0, 0.25, 2.0]), codebook_weight=st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_any_shape(rows, codes, width, groups, metric, seed, dtype, commitment, codebook_weight):
    weights = {"commitment_weight": commitment, "codebook_weight": codebook_weight}
    x, codebook = leaves(
        normal(rows, groups, width, seed=seed, dtype=dtype), normal(groups, codes, width, seed=seed + 1)
    )
    out = quantize(x, codebook, metric=metric, **weights, backend="native")
    assert torch.equal(out.indices, nearest_code(x, codebook, metric=metric, backend="native"))
    wide = leaves(x.double(), codebook.double())
    if rows == 0:
        assert out.loss.item() == 0
        return
    quantized, loss = by_hand(*wide, out.indices, metric, **weights)
    assert_near(out.loss, loss, 3e-6, "loss", size=1e-12)
    gradients = torch.autograd.grad(out.loss, (x, codebook))
    coarse = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 2e-5)
    assert_gradients(gradients, torch.autograd.grad(loss, wide), coarse, size=1e-3 if width == 1 else 0.0)


def test_opcheck():
    for metric in METRICS:
        x, codebook = normal(9, 2, 4).requires_grad_(), normal(2, 20, 4).requires_grad_()
        opcheck("quantize", x, codebook, [4], [1.0], metric, 0.25, 1.0, True)
    opcheck(
        "quantize",
        normal(9, 1, 4, dtype=torch.bfloat16).requires_grad_(),
        normal(1, 20, 4),
        [4],
        [1.0],
        "cosine",
        0.25,
        1.0,
        True,
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_forward_and_backward(backend):
    def step(x, codebook):
        quantized, indices, loss = quantize(x * 2, codebook, metric="l2")
        return quantized.square().sum() + loss, indices

    inputs = leaves(normal(33, 8, seed=1), normal(70, 8, seed=2))
    value, indices = compiled(step, backend)(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    expected, expected_indices = step(*inputs)
    assert torch.equal(indices, expected_indices)
    assert_near(value, expected, 1e-6)
    assert_gradients(gradients, torch.autograd.grad(expected, inputs), 1e-6)


X, CODES = torch.zeros(3, 4), torch.zeros(7, 4)
BAD = {
    "no tensor": ("x", TypeError, {"x": 1.0}),
    "integers": ("x", TypeError, {"x": X.long()}),
    "width": ("x", ValueError, {"x": torch.zeros(3, 5)}),
    "groups": ("x", ValueError, {"x": torch.zeros(3, 3, 4), "codebook": torch.zeros(2, 7, 4)}),
    "integer codes": ("codebook", TypeError, {"codebook": CODES.int()}),
    "no codes": ("codebook", ValueError, {"codebook": torch.zeros(0, 4)}),
    "rank": ("codebook", ValueError, {"codebook": torch.zeros(4)}),
    "device": ("codebook", ValueError, {"codebook": CODES.to("meta")}),
    "metric": ("metric", ValueError, {"metric": "euclid"}),
    "negative": ("commitment_weight", ValueError, {"commitment_weight": -0.1}),
    "infinite": ("codebook_weight", ValueError, {"codebook_weight": float("inf")}),
    "word": ("codebook_weight", TypeError, {"codebook_weight": "1"}),
    "backend": ("backend", ValueError, {"backend": "best"}),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    argument, error, change = BAD[case]
    arguments = {"x": X, "codebook": CODES, "backend": backend, **change}
    assert_sentence(
        error, "quantize", argument, lambda: ops.quantize(arguments.pop("x"), arguments.pop("codebook"), **arguments)
    )
