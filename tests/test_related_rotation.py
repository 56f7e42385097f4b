"""The rotation trick: the same values, and the gradient of a rotation of constant parts."""

import warnings

import pytest
import torch
from harness import METRICS, assert_near, compiled, leaves, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext.quantize import SharedIndexQuantizer, VectorQuantizer
from tokenflow_ext.quantize._gradients import straight_through, turned_back

KINDS = {
    "vector": lambda **k: VectorQuantizer(6, 20, **k),
    "groups": lambda **k: VectorQuantizer(6, 20, groups=3, **k),
    "shared": lambda **k: SharedIndexQuantizer((4, 2), 20, weights=(1.0, 3.0), **k),
}
WIDTHS = {"vector": [6], "groups": [2, 2, 2], "shared": [4, 2]}


def rotation(y, q):
    """The D x D matrix that turns y / |y| into q / |q| in their plane and leaves what is orthogonal to it."""
    y, q = y / y.norm(), q / q.norm()
    across = q - (q @ y) * y
    sine, cosine = across.norm(), y @ q
    across = across / sine
    plane = torch.stack([y, across])
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return torch.eye(len(y), dtype=y.dtype) + plane.T @ (turn - torch.eye(2, dtype=y.dtype)) @ plane


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_a_rotation(kind, metric):
    outs = []
    for gradient in ("straight_through", "rotation"):
        torch.manual_seed(1)
        outs.append(KINDS[kind](metric=metric, gradient=gradient, backend="native").double())
    (x,), upstream = leaves(normal(9, 6, dtype=torch.float64)), normal(9, 6, seed=2, dtype=torch.float64)
    plain, turned = (quantizer(x) for quantizer in outs)
    assert same_bits(plain.quantized, turned.quantized) and same_bits(plain.loss, turned.loss)
    parts = x.split(WIDTHS[kind], -1)
    searched = [torch.nn.functional.normalize(p, dim=-1) if metric == "cosine" else p for p in parts]
    wanted = []
    for y, q, g in zip(searched, turned.quantized.detach().split(WIDTHS[kind], -1), upstream.split(WIDTHS[kind], -1)):
        rows = [q[n].norm() / y[n].norm() * rotation(y[n], q[n]).T @ g[n] for n in range(len(y))]
        wanted.append(torch.stack(rows).detach())
    (expected,) = torch.autograd.grad(torch.cat(searched, -1), x, torch.cat(wanted, -1))
    (actual,) = torch.autograd.grad((turned.quantized * upstream).sum(), x, retain_graph=True)
    assert_near(actual, expected, 1e-12)
    (straight,) = torch.autograd.grad((plain.quantized * upstream).sum(), x, retain_graph=True)
    assert not torch.allclose(actual, straight)
    (a,), (b,) = (torch.autograd.grad(out.loss, x) for out in (plain, turned))
    assert same_bits(a, b), "the loss has its own gradient"


@settings(max_examples=60, deadline=None)
@given(width=st.integers(2, 40), seed=st.integers(0, 999), near=st.sampled_from([0.0, 1e-3, 1e-6, 1.0]))
def test_turned_back_is_the_rotation(width, seed, near):
    """Lengths scale by |q| / |y|, angles stay, and a gradient along q comes back along y."""
    y, noise, a, b = (normal(width, seed=seed + 1000 * i, dtype=torch.float64) for i in range(4))
    q = 2 * y + near * noise if near else noise
    scale = q.norm() / y.norm()
    back_a, back_b = turned_back(a[None], y[None], q[None])[0], turned_back(b[None], y[None], q[None])[0]
    assert abs(back_a @ back_b - scale**2 * (a @ b)) <= 1e-9 * scale**2 * a.norm() * b.norm()
    along = turned_back(q[None], y[None], q[None])[0]
    assert_near(along, scale**2 * y, 1e-9)


def test_antiparallel_and_zero_rows():
    table = torch.tensor([[-2.0, 0.0, 0.0]])
    quantizer = VectorQuantizer(3, 1, metric="l2", gradient="rotation")
    quantizer.codebook.table_0.data.copy_(table)
    (x,) = leaves(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1e-30, 0.0], [float("nan"), 0.0, 0.0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the row that is not finite
        out = quantizer(x)
    (grad,) = torch.autograd.grad((out.quantized * torch.tensor([1.0, 2.0, 3.0])).nan_to_num().sum(), x)
    expected = 2 * torch.tensor([-1.0, 2.0, 3.0])  # a reflection: no plane is given
    assert_near(grad[0], expected, 1e-6)
    assert_near(grad[1], torch.tensor([1.0, 2.0, 3.0]), 0)
    assert_near(grad[2], expected, 1e-6)
    assert not grad[3].any()
    quantizer.codebook.table_0.data.zero_()
    (grad,) = torch.autograd.grad(quantizer(x[:3]).quantized.sum(), x)
    assert grad.isfinite().all() and not grad[0].any()
    cosine = VectorQuantizer(3, 5, gradient="rotation")
    (grad,) = torch.autograd.grad(cosine(x[:3]).quantized.sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows(dtype):
    quantizer = VectorQuantizer(6, 20, gradient="rotation")
    (x,), (y,) = leaves(normal(9, 6).to(dtype)), leaves(normal(9, 6).to(dtype).float())
    upstream = normal(9, 6, seed=2)
    (a,) = torch.autograd.grad((quantizer(x).quantized.float() * upstream).sum(), x)
    (b,) = torch.autograd.grad((quantizer(y).quantized * upstream).sum(), y)
    assert a.dtype == dtype
    assert_near(a, b, 0.03)


def test_an_output_that_is_written_to():
    """Backward reads what the module kept, not what the user has."""
    torch.manual_seed(1)
    quantizer, (x,), upstream = VectorQuantizer(6, 20, gradient="rotation"), leaves(normal(9, 6)), normal(9, 6, seed=2)
    (expected,) = torch.autograd.grad(quantizer(x).quantized, x, upstream)
    out = quantizer(x).quantized.mul_(2)
    assert_near(torch.autograd.grad(out, x, upstream)[0], 2 * expected, 1e-6)


def test_straight_through():
    (x,), q = leaves(normal(4, 3).half()), normal(4, 3, seed=2)
    q[1, 2] = float("nan")
    q[0, 0] = -0.0
    out = straight_through(x, q.requires_grad_())
    assert same_bits(out, q.half())
    out.backward(torch.full_like(out, 3.0))
    assert torch.equal(x.grad, torch.where(q.isnan(), 0.0, 3.0).half()) and q.grad is None


def test_compiles():
    torch.manual_seed(1)
    quantizer, (x,) = VectorQuantizer(6, 20, groups=3, gradient="rotation").eval(), leaves(normal(9, 6))
    step = compiled(lambda x: quantizer(x).quantized.sin().sum())
    (a,) = torch.autograd.grad(step(x), x)
    (b,) = torch.autograd.grad(quantizer(x).quantized.sin().sum(), x)
    assert_near(a, b, 1e-5)


def test_rows_left_out_turn_nothing():
    """With a mask, the gradient of the rows that stay is theirs alone, and padding gets none, whatever it holds."""
    quantizer = VectorQuantizer(5, 30, metric="l2", gradient="rotation")
    x, upstream = normal(8, 5), normal(8, 5, seed=3)
    mask = torch.tensor([True, False, True, True, False, True, False, True])
    padded = torch.where(mask[:, None], x, torch.nan)
    (a,), (b,) = leaves(padded), leaves(x[mask])
    (quantizer(a, mask).quantized * upstream).sum().backward()
    (quantizer(b).quantized * upstream[mask]).sum().backward()
    assert_near(a.grad[mask], b.grad, 1e-6)
    assert b.grad.any() and not a.grad[~mask].any()
