"""normalize_rows: the canonical normalisation, bit for bit, and its gradient."""

import numpy as np
import pytest
import torch
from harness import (
    FLOATS,
    assert_gradients,
    assert_near,
    assert_sentence,
    canonical_unit,
    compiled,
    leaves,
    normal,
    opcheck,
    same_bits,
    with_threads,
)  # fmt: skip

from tokenflow_ext import reference
from tokenflow_ext.ops import normalize_rows


@pytest.mark.parametrize("scale", [1.0, 1e-16, 1e15])
@pytest.mark.parametrize("width", [1, 7, 32, 100])
def test_canonical_bits(width, scale):
    x = normal(70, width, seed=1) * scale
    found = normalize_rows(x, backend="native").numpy()
    assert np.array_equal(found.view(np.int32), canonical_unit(x.numpy()).view(np.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_of_the_twin(dtype):
    (x,) = leaves(normal(130, 9, seed=1, dtype=dtype))
    (wide,) = leaves(x.double())
    found, expected = normalize_rows(x, backend="native"), reference.normalize_rows(wide)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert_near(found, expected, tolerance)
    upstream = normal(130, 9, seed=2, dtype=dtype)
    gradients = torch.autograd.grad(found, x, upstream)
    assert_gradients(gradients, torch.autograd.grad(expected, wide, upstream.double()), 4 * tolerance)


def test_gradcheck():
    (x,) = leaves(normal(5, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a: normalize_rows(a, backend="native"), x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_types_shapes_and_views(dtype):
    x = normal(6, 5, 4, seed=1, dtype=dtype)
    found = normalize_rows(x, backend="native")
    assert found.dtype == dtype and found.shape == x.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert same_bits(found, normalize_rows(x.to(wide), backend="native").to(dtype))
    assert same_bits(normalize_rows(x.transpose(0, 1), backend="native"), found.transpose(0, 1).contiguous())
    assert normalize_rows(x[:0], backend="native").shape == (0, 5, 4)
    assert same_bits(normalize_rows(x[2, 3], backend="native"), found[2, 3])


def test_zero_rows_stay_zero():
    (x,) = leaves(torch.zeros(2, 3))
    found = normalize_rows(x, backend="native")
    assert not found.any()
    (wide,) = leaves(x.double())
    gradients = torch.autograd.grad(found.sum(), x)
    assert_gradients(gradients, torch.autograd.grad(reference.normalize_rows(wide).sum(), wide), 1e-6)


def test_threads_change_no_bit():
    x, upstream = normal(4000, 40, seed=1), normal(4000, 40, seed=2)

    def call():
        (leaf,) = leaves(x)
        found = normalize_rows(leaf, backend="native")
        return found, torch.autograd.grad(found, leaf, upstream)[0]

    first, *others = with_threads((1, 2, 3, 8), call)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other))


def test_second_derivative_raises():
    (x,) = leaves(normal(3, 4))
    (gradient,) = torch.autograd.grad(normalize_rows(x, backend="native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="normalize_rows.*once"):
        torch.autograd.grad(gradient.sum(), x)


def test_opcheck_and_compile():
    (x,) = leaves(normal(9, 4))
    opcheck("normalize_rows", x)
    step = lambda a: (normalize_rows(a) * a.exp()).sum()  # noqa: E731
    assert_gradients(torch.autograd.grad(compiled(step)(x), x), torch.autograd.grad(step(x), x), 1e-6)


@pytest.mark.parametrize(
    ("argument", "error", "x", "options"),
    [
        ("x", TypeError, torch.zeros(3, dtype=torch.int64), {}),
        ("x", TypeError, [1.0], {}),
        ("x", ValueError, torch.zeros(()), {}),
        ("x", ValueError, torch.zeros(3, 0), {}),
        ("backend", ValueError, torch.zeros(3), {"backend": "x"}),
    ],
)
def test_bad_input(argument, error, x, options):
    assert_sentence(error, "normalize_rows", argument, normalize_rows, x, **options)
