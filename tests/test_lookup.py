"""lookup and shared_lookup: gather and its deterministic scatter-add."""

import pytest
import torch
from harness import (
    FLOATS,
    assert_gradients,
    assert_near,
    assert_sentence,
    compiled,
    leaves,
    normal,
    opcheck,
    same_bits,
    with_threads,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import ops, reference
from tokenflow_ext.ops import lookup, shared_lookup


def integers(*shape, high, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (130,), (2, 3, 4), (0,), (2, 0, 3)])
def test_values_are_the_rows(shape, dtype):
    codebook, indices = normal(33, 7, seed=1, dtype=dtype), integers(*shape, high=33)
    found = lookup(indices, codebook, backend="native")
    assert same_bits(found, codebook[indices]) and found.is_contiguous()
    assert same_bits(found, reference.lookup(indices, codebook))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "codes", "groups", "width"), [(1, 1, 0, 1), (500, 7, 0, 5), (130, 300, 4, 8), (3, 2000, 2, 3)]
)
def test_gradient_of_the_twin(rows, codes, groups, width, dtype):
    shape = (groups, codes, width) if groups else (codes, width)
    indices = integers(*((rows, groups) if groups else (rows,)), high=codes)
    codebook, wide = leaves(normal(*shape, seed=1, dtype=dtype), normal(*shape, seed=1, dtype=dtype).double())
    found, expected = lookup(indices, codebook, backend="native"), reference.lookup(indices, wide)
    assert found.shape == expected.shape and same_bits(found, expected.to(dtype))
    upstream = normal(*found.shape, seed=2, dtype=dtype)
    (gradient,) = torch.autograd.grad(found, codebook, upstream)
    (exact,) = torch.autograd.grad(expected, wide, upstream.double())
    assert_near(gradient, exact, 3e-5 if dtype == torch.float32 else 1e-13)


def test_gradcheck():
    (codebook,) = leaves(normal(6, 3, dtype=torch.float64))
    indices = torch.tensor([[0, 5, 5], [2, 2, 2]])
    assert torch.autograd.gradcheck(lambda c: lookup(indices, c, backend="native"), codebook)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_summed_in_float32(dtype):
    """4096 equal gradients of 1/8: a sum in the half type would stop growing."""
    (codebook,) = leaves(normal(3, 2, dtype=dtype))
    found = lookup(torch.ones(4096, dtype=torch.int64), codebook, backend="native")
    (gradient,) = torch.autograd.grad(found, codebook, torch.full_like(found, 0.125))
    assert gradient.dtype == dtype and gradient.tolist() == [[0.0, 0.0], [512.0, 512.0], [0.0, 0.0]]


def test_gradient_follows_row_order_not_threads():
    codebook, indices, upstream = normal(700, 24, seed=1), integers(5000, high=700), normal(5000, 24, seed=2)

    def gradient():
        (leaf,) = leaves(codebook)
        return torch.autograd.grad(lookup(indices, leaf, backend="native"), leaf, upstream)[0]

    first, *others = with_threads((1, 2, 3, 8, 64), gradient)
    assert all(same_bits(first, other) for other in others)


def test_large_results_pass_the_cache_by():
    """Results beyond the cache are streamed: the same bits, for widths with and without whole registers."""
    for width, groups in ((8, 1), (6, 1), (12, 2)):
        codebook, indices = normal(groups, 90, width), integers(2**19 + 3, groups, high=90)
        found = lookup(indices, codebook, backend="native")
        assert same_bits(found, codebook[torch.arange(groups), indices])


def test_second_derivative_raises():
    (codebook,) = leaves(normal(4, 2))
    found = lookup(torch.tensor([1, 2]), codebook, backend="native")
    (upstream,) = leaves(torch.ones(2, 2))
    (gradient,) = torch.autograd.grad(found, codebook, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="lookup.*once"):
        torch.autograd.grad(gradient.sum(), upstream)


def test_views():
    codebook = normal(5, 40, seed=1).T
    indices = integers(6, 10, high=40).T[::2]
    assert same_bits(lookup(indices, codebook, backend="native"), codebook.contiguous()[indices.contiguous()])
    (leaf,) = leaves(codebook)
    upstream = normal(5, 6, 5, seed=2).transpose(0, 2)
    found = lookup(indices.T, leaf, backend="native").transpose(0, 1)
    (gradient,) = torch.autograd.grad(found, leaf, upstream)
    (wide,) = leaves(codebook)
    (expected,) = torch.autograd.grad(wide[indices], wide, upstream)
    assert_near(gradient, expected, 1e-6)


def test_a_nan_code_is_read_as_it_is():
    codebook = normal(4, 2)
    codebook[1, 0] = float("nan")
    assert same_bits(lookup(torch.tensor([1, 3]), codebook, backend="native"), codebook[[1, 3]])


def test_shared_tables():
    codebooks = leaves(normal(9, 4, seed=1), normal(9, 2, seed=2, dtype=torch.bfloat16))
    indices = integers(5, 3, high=9)
    found = shared_lookup(indices, codebooks, backend="native")
    assert isinstance(found, tuple)
    for value, codebook in zip(found, codebooks):
        assert same_bits(value, codebook[indices])
    gradients = torch.autograd.grad(sum(v.float().square().sum() for v in found), codebooks)
    expected = torch.autograd.grad(
        sum(v.float().square().sum() for v in reference.shared_lookup(indices, codebooks)), codebooks
    )
    assert_near(gradients[0], expected[0], 1e-6)
    assert_near(gradients[1], expected[1], 1e-2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 200),
    codes=st.integers(1, 60),
    groups=st.integers(1, 4),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_any_shape(rows, codes, groups, width, seed):
    codebook, wide = leaves(normal(groups, codes, width, seed=seed), normal(groups, codes, width, seed=seed).double())
    indices = integers(rows, groups, high=codes, seed=seed)
    found = lookup(indices, codebook, backend="native")
    assert same_bits(found, reference.lookup(indices, codebook))
    upstream = normal(rows, groups, width, seed=seed + 1)
    (gradient,) = torch.autograd.grad(found, codebook, upstream)
    assert_gradients([gradient], torch.autograd.grad(reference.lookup(indices, wide), wide, upstream.double()), 1e-5)


def test_opcheck():
    opcheck("lookup", integers(9, 2, high=5), normal(2, 5, 3).requires_grad_())
    opcheck("lookup", integers(9, 1, high=5), normal(1, 5, 3, dtype=torch.bfloat16).requires_grad_())
    opcheck("lookup", integers(3, 3, high=5), normal(5, 3).requires_grad_())


def test_compile_forward_and_backward():
    indices = integers(20, high=9)
    (codebook,) = leaves(normal(9, 4))
    step = lambda c: lookup(indices, c).square().sum()  # noqa: E731
    gradients = torch.autograd.grad(compiled(step)(codebook), codebook)
    assert_gradients(gradients, torch.autograd.grad(step(codebook), codebook), 1e-6)


IDS, CODES = torch.tensor([0, 3]), torch.zeros(4, 2)
BAD = {
    "no tensor": ("indices", TypeError, {"indices": [0, 1]}),
    "int32": ("indices", TypeError, {"indices": IDS.int()}),
    "floats": ("indices", TypeError, {"indices": IDS.float()}),
    "too large": ("indices", ValueError, {"indices": IDS + 1}),
    "negative": ("indices", ValueError, {"indices": IDS - 1}),
    "far": ("indices", ValueError, {"indices": IDS + (1 << 62)}),
    "no tensor of codes": ("codebook", TypeError, {"codebook": None}),
    "integer codes": ("codebook", TypeError, {"codebook": CODES.int()}),
    "rank": ("codebook", ValueError, {"codebook": torch.zeros(4)}),
    "no codes": ("codebook", ValueError, {"codebook": torch.zeros(0, 2)}),
    "no groups": (
        "codebook",
        ValueError,
        {"codebook": torch.zeros(0, 4, 2), "indices": torch.zeros(3, 0, dtype=torch.int64)},
    ),
    "groups": ("indices", ValueError, {"codebook": torch.zeros(3, 4, 2)}),
    "device": ("indices", ValueError, {"indices": IDS.to("meta")}),
    "backend": ("backend", ValueError, {"backend": "x"}),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    argument, error, change = BAD[case]
    arguments = {"indices": IDS, "codebook": CODES, "backend": backend, **change}
    assert_sentence(
        error, "lookup", argument, lambda: ops.lookup(arguments.pop("indices"), arguments.pop("codebook"), **arguments)
    )


SHARED_BAD = {
    "a tensor": ("codebooks", TypeError, {"codebooks": CODES}),
    "a number": ("codebooks", TypeError, {"codebooks": 3}),
    "none": ("codebooks", ValueError, {"codebooks": ()}),
    "integer codes": ("codebooks[1]", TypeError, {"codebooks": (CODES, CODES.int())}),
    "other K": ("codebooks[1]", ValueError, {"codebooks": (CODES, CODES[:3])}),
    "rank": ("codebooks[0]", ValueError, {"codebooks": (CODES[None], CODES)}),
    "int32": ("indices", TypeError, {"indices": IDS.int()}),
    "outside": ("indices", ValueError, {"indices": IDS + 1}),
    "device": ("codebooks[0]", ValueError, {"indices": IDS.to("meta")}),
    "backend": ("backend", ValueError, {"backend": "x"}),
}


@pytest.mark.parametrize("case", SHARED_BAD)
def test_bad_input_of_shared_tables(case):
    argument, error, change = SHARED_BAD[case]
    arguments = {"indices": IDS, "codebooks": (CODES, CODES), "backend": "native", **change}
    assert_sentence(
        error,
        "shared_lookup",
        argument,
        lambda: ops.shared_lookup(arguments.pop("indices"), arguments.pop("codebooks"), **arguments),
    )
