"""LFQ and BSQ: signs against a dense search of all codes, entropies against all codes, bits to ids and back."""

import pytest
import torch
from harness import assert_near, assert_sentence, leaves, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import ops
from tokenflow_ext.quantize import SignQuantizer, pack_bits, unpack_bits

SPHERES = [False, True]


def all_codes(width: int, size: float, dtype=torch.float64) -> torch.Tensor:
    bits = torch.arange(2**width)[:, None] >> torch.arange(width) & 1
    return (2.0 * bits - 1).to(dtype) * size


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("spherical", SPHERES)
def test_signs_are_the_nearest_of_all_codes(spherical, metric):
    quantizer, x = SignQuantizer(10, spherical=spherical), normal(500, 10)
    x[0, 3], x[1] = 0.0, 0.0
    codes = all_codes(10, quantizer.size, torch.float32)
    y = ops.normalize_rows(x) if spherical else x
    out = quantizer(x)
    assert torch.equal(out.indices, ops.nearest_code(y, codes, metric=metric))
    assert torch.equal(out.quantized, codes[out.indices])
    assert_near(out.loss, 0.25 * (codes[out.indices] - y).square().mean(), 1e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("spherical", SPHERES)
def test_entropy_of_bits(spherical, temperature):
    """The first term is the exact entropy over all 2^D codes; the second is that of mean bits, at least the codes' own."""
    width, options = 8, {"spherical": spherical, "entropy_temperature": temperature}
    whole = SignQuantizer(width, entropy_weight=1.0, commitment_weight=0.0, **options)
    (x,) = leaves(normal(40, width, dtype=torch.float64))
    loss = whole(x).loss
    (actual,) = torch.autograd.grad(loss, x)
    y = torch.nn.functional.normalize(x, dim=-1) if spherical else x
    codes = all_codes(width, whole.size)
    log_p = (-(y[:, None] - codes).square().sum(-1) / temperature).log_softmax(-1)
    bits = (log_p.exp() @ (codes > 0).double()).mean(0)  # marginals of the mean
    first = -(log_p.exp() * log_p).sum(-1).mean()
    second = -(bits * bits.log() + (1 - bits) * (1 - bits).log()).sum()
    assert_near(loss, first - second, 1e-9)
    assert_near(actual, torch.autograd.grad(first - second, x)[0], 1e-8)
    exact, of_codes = ops.entropy_loss(y.detach(), codes, metric="l2", temperature=temperature, eps=0.0)
    assert_near(exact, first, 1e-9)
    assert second >= of_codes - 1e-9
    whole.eval()
    assert whole(x).loss == 0, "in training only"


def test_rows_left_out_of_the_entropy():
    """They add nothing to either term, and the denominators stay."""
    quantizer, x = SignQuantizer(5, entropy_weight=1.0, commitment_weight=0.0), normal(8, 5, dtype=torch.float64)
    x[3, 1] = float("nan")
    p = torch.sigmoid(4 * x[[0, 1, 2, 4, 5, 6, 7]])
    means = p.sum(0) / 8
    first, second = (-(q * q.log() + (1 - q) * (1 - q).log()).sum() for q in (p, means))
    assert_near(quantizer(x).loss, first / 8 - second, 1e-12)


@pytest.mark.parametrize("spherical", SPHERES)
def test_gradient(spherical):
    """d quantized / dy = 1, through the sphere; saturated bits give finite gradients."""
    quantizer = SignQuantizer(6, spherical=spherical, entropy_weight=0.1, entropy_temperature=1e-4)
    (x,), upstream = leaves(normal(9, 6, dtype=torch.float64)), normal(9, 6, seed=2, dtype=torch.float64)
    out = quantizer(x)
    y = torch.nn.functional.normalize(x, dim=-1) if spherical else x
    (actual,) = torch.autograd.grad((out.quantized * upstream).sum(), x, retain_graph=True)
    assert_near(actual, torch.autograd.grad((y * upstream).sum(), x)[0], 1e-12)
    assert torch.autograd.grad(out.loss, x)[0].isfinite().all()
    zero = torch.zeros(2, 6, requires_grad=True)
    quantizer(zero).loss.backward()
    assert zero.grad.isfinite().all()


def test_unit_codes():
    out = SignQuantizer(18, spherical=True)(normal(5, 18, dtype=torch.float64))
    assert_near(out.quantized.norm(dim=-1), torch.ones(5), 1e-14)


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 62), data=st.data())
def test_pack_and_unpack(width, data):
    ids = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=5))
    bits = unpack_bits(torch.tensor(ids), width)
    assert [[bool(i >> j & 1) for j in range(width)] for i in ids] == bits.tolist()
    assert pack_bits(bits).tolist() == ids


def test_62_bits():
    quantizer, x = SignQuantizer(62), normal(50, 62)
    out = quantizer(x)
    assert out.indices.max() > 2**60 and out.indices.min() >= 0
    assert torch.equal(quantizer.decode(out.indices), x.sign()) and torch.equal(quantizer.encode(x), out.indices)


def test_usage_of_bits():
    quantizer = SignQuantizer(3)
    quantizer(torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, -1.0]]))
    assert quantizer.usage() == 4 / 6 and abs(quantizer.perplexity() - 2) < 1e-6
    with pytest.warns(RuntimeWarning, match="SignQuantizer: 1 rows hold NaN or inf"):
        quantizer(torch.tensor([[-1.0, 1.0, float("nan")]]))
    assert quantizer.usage() == 4 / 6, "a row that is not finite counts nowhere"
    assert quantizer.usage(all_ranks=False) == 4 / 6 and quantizer.non_finite_rows() == 1
    assert not list(quantizer.buffers()), "DistributedDataParallel would overwrite every rank's counts by rank 0's"
    assert quantizer.half().hits.dtype == torch.int64
    quantizer.reset_usage()
    assert quantizer.usage() == quantizer.perplexity() == quantizer.non_finite_rows() == 0
    quantizer.freeze()
    assert quantizer.codebooks() == ()


@pytest.mark.parametrize(
    "error, name, argument, call",
    [
        (TypeError, "pack_bits", "bits", lambda: pack_bits(torch.ones(3))),
        (ValueError, "pack_bits", "bits", lambda: pack_bits(torch.ones(2, 63, dtype=torch.bool))),
        (TypeError, "unpack_bits", "indices", lambda: unpack_bits(torch.ones(3), 4)),
        (ValueError, "unpack_bits", "width", lambda: unpack_bits(torch.tensor(1), 63)),
    ],
)
def test_bad_input(error, name, argument, call):
    assert_sentence(error, name, argument, call)


def test_ids_outside():
    for bad in (-1, 16):
        with pytest.raises(ValueError, match="16"):
            unpack_bits(torch.tensor([bad]), 4)
