"""Products of quantizers, disentanglement, folded ids, and training on prefixes of scales."""

import copy

import pytest
import torch
from harness import assert_gradients, assert_near, assert_sentence, leaves, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext.quantize import (
    MultiScaleQuantizer,
    PrefixMultiScaleQuantizer,
    ProductQuantizer,
    VectorQuantizer,
    disentangle_loss,
    fold,
    unfold,
)

SCALES = (1, 1, 2, (3, 2), 4)


@pytest.mark.parametrize("count", [2, 3])
def test_disentangle_loss(count):
    q = leaves(*(normal(5, 4, 6, seed=s, dtype=torch.float64) for s in range(count)))
    unit = [part / part.norm(dim=-1, keepdim=True) for part in q]
    pairs = [(unit[a] * unit[b]).sum(-1).square().mean() for a in range(count) for b in range(a)]
    expected = 0.3 * sum(pairs) / len(pairs)
    loss = disentangle_loss(q, weight=0.3)
    assert_near(loss, expected, 1e-12)
    assert_gradients(torch.autograd.grad(loss, q), torch.autograd.grad(expected, q), 1e-12)
    moved = disentangle_loss([part.movedim(-1, 1) for part in q], weight=0.3, channel_dim=1)
    assert_near(moved, expected, 1e-12)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(2, 20), seed=st.integers(0, 99), length=st.floats(0.01, 100))
def test_identical_and_orthogonal(width, seed, length):
    basis = torch.linalg.qr(normal(width, width, seed=seed, dtype=torch.float64)).Q
    a, b = basis[0].expand(7, width), length * basis[1].expand(7, width)
    assert abs(float(disentangle_loss([a, b], weight=0.1))) < 1e-12
    assert abs(float(disentangle_loss([a, length * a], weight=0.1)) - 0.1) < 1e-12
    assert abs(float(disentangle_loss([a, a, b], weight=0.3)) - 0.1) < 1e-12


def test_disentangle_edges():
    assert disentangle_loss([torch.zeros(0, 4)] * 2) == 0
    (q,) = leaves(torch.tensor([[1.0, 0.0], [float("nan"), 1.0], [0.0, 0.0]]))
    loss = disentangle_loss([q, torch.tensor([[0.6, 0.8]]).expand(3, 2)])
    assert_near(loss, torch.tensor(0.36 / 3), 1e-6)
    loss.backward()
    assert q.grad.isfinite().all()
    assert_sentence(ValueError, "disentangle_loss", "quantized", disentangle_loss, [torch.ones(2, 3)])
    assert_sentence(ValueError, "disentangle_loss", "quantized", disentangle_loss, [torch.ones(2, 3), torch.ones(2, 4)])
    assert_sentence(TypeError, "disentangle_loss", "quantized", disentangle_loss, torch.ones(2, 3))
    assert_sentence(ValueError, "disentangle_loss", "weight", disentangle_loss, [torch.ones(2, 3)] * 2, weight=-1)


@settings(max_examples=30, deadline=None)
@given(streams=st.integers(1, 4), batch=st.integers(0, 3), length=st.integers(0, 9))
def test_fold_and_unfold(streams, batch, length):
    ids = [torch.randint(0, 99, (batch, length)) for _ in range(streams)]
    folded = fold(ids)
    assert folded.shape == (batch, length, streams)
    assert all(torch.equal(a, b) for a, b in zip(unfold(folded), ids, strict=True))


def test_fold_bad_input():
    assert_sentence(
        ValueError, "fold", "streams", fold, [torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)]
    )
    assert_sentence(TypeError, "fold", "streams", fold, [torch.zeros(2)])
    assert_sentence(TypeError, "unfold", "indices", unfold, torch.zeros(2))
    assert_sentence(ValueError, "unfold", "indices", unfold, torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("joined", [True, False])
def test_product_is_its_branches(joined):
    torch.manual_seed(1)
    branches = [VectorQuantizer(w, k, channel_dim=1) for w, k in ((4, 30), (6, 20), (5, 9))]
    alone, product = copy.deepcopy(branches), ProductQuantizer(branches, joined=joined)
    xs = [normal(2, w, 3, seed=w) for w in (4, 6, 5)]
    x = torch.cat(xs, 1) if joined else xs
    out, expected = product(x), [quantizer(part) for quantizer, part in zip(alone, xs)]
    parts = out.quantized.split((4, 6, 5), 1) if joined else out.quantized
    assert all(same_bits(a, b.quantized) for a, b in zip(parts, expected, strict=True))
    assert all(torch.equal(a, b.indices) for a, b in zip(unfold(out.indices), expected, strict=True))
    assert_near(out.loss, sum(b.loss for b in expected), 1e-6)
    assert abs(product.usage() - sum(q.usage() for q in alone) / 3) < 1e-12
    for measure in ("usage", "perplexity"):
        each = getattr(product, measure)("quantizer", all_ranks=False)
        assert each.tolist() == [getattr(q, measure)() for q in alone] and each.dtype == torch.float64
    decoded = product.eval().decode(out.indices)
    for a, b in zip([decoded] if joined else decoded, [out.quantized] if joined else out.quantized, strict=True):
        assert same_bits(a, b)
    with pytest.raises(TypeError, match="ProductQuantizer: inputs: wanted quantizers with scales"):
        product.inputs(out.indices)


def prefix(dropped=1.0, phi=True, **options):
    torch.manual_seed(4)
    p = (
        torch.nn.Parameter(0.1 * torch.randn(2, 6, 6, 3, 3)),
        torch.nn.Parameter(0.1 * torch.randn(2, 6)),
        0.5,
        [0, 0, 1, 1, 1],
    )
    inner = VectorQuantizer(6, 30, backend="native", **options)
    return PrefixMultiScaleQuantizer(inner, SCALES, dropped=dropped, phi=p if phi else None, normalize_codes=False)


def leaves_of(quantizer):
    return [*quantizer.codebooks(), quantizer.phi_weight, quantizer.phi_bias]


def test_full_depth_is_the_plain_quantizer():
    """Depth S for all: output, ids, loss and gradients of the fused op."""
    quantizer, (x,), (y,) = prefix(), leaves(normal(3, 6, 4, 4)), leaves(normal(3, 6, 4, 4))
    a, b = quantizer(x, depths=torch.full((3,), 5)), MultiScaleQuantizer.forward(quantizer, y)
    assert same_bits(a.quantized, b.quantized) and torch.equal(a.indices, b.indices)
    assert_near(a.loss, b.loss, 1e-6)
    upstream = normal(3, 6, 4, 4, seed=2)
    ga, gb = (
        torch.autograd.grad((out.quantized * upstream).sum() + out.loss, [leaf, *leaves_of(quantizer)])
        for out, leaf in ((a, x), (b, y))
    )
    assert_gradients(ga, gb, 1e-5)


def test_every_depth_is_its_prefix_and_its_loss():
    """A sample's map is its prefix's bit for bit; the loss is that of the samples still there, scale by scale."""
    quantizer, (x,) = prefix(commitment_weight=0.3, codebook_weight=0.7), leaves(normal(5, 6, 4, 4))
    depths = torch.arange(1, 6)
    out, ids = quantizer(x, depths=depths), quantizer.encode(x)
    ends = torch.tensor([h * w for h, w in quantizer.scales]).cumsum(0).tolist()
    exact = copy.deepcopy(quantizer).double()
    (z,) = leaves(x.double())
    loss = 0
    for s, end in enumerate(ends):
        assert same_bits(out.quantized[s], quantizer.decode(ids[s : s + 1, :end])[0])
        assert bool((out.indices[s, end:] == -1).all()) and torch.equal(out.indices[s, :end], ids[s, :end])
        f = exact.decode(ids[s:, :end])  # samples s.. still have scale s
        there = z[s:]
        loss = loss + (0.7 * (f - there.detach()).square().mean() + 0.3 * (f.detach() - there).square().mean()) / 5
    assert_near(out.loss, loss, 1e-5)
    expected = torch.autograd.grad(loss, [z, *leaves_of(exact)])
    assert_gradients(torch.autograd.grad(out.loss, [x, *leaves_of(quantizer)]), expected, 1e-4)


def test_drawn_depths():
    quantizer = prefix(dropped=0.5)
    quantizer.min_depth = 3
    torch.manual_seed(0)
    drawn = torch.stack([quantizer.draw(9, torch.device("cpu")) for _ in range(60)])
    assert bool((drawn[:, 4:] == 5).all()) and set(drawn[:, :4].flatten().tolist()) == {3, 4, 5}
    x = normal(4, 6, 4, 4)
    assert not bool((quantizer.eval()(x).indices == -1).any()), "in training only"


def test_branches_drop_the_same_scales():
    torch.manual_seed(0)
    branches = [PrefixMultiScaleQuantizer(VectorQuantizer(3, 30), SCALES, dropped=1.0) for _ in range(2)]
    product = ProductQuantizer(branches)
    for _ in range(5):
        left, right = unfold(product(normal(6, 6, 4, 4)).indices)
        assert torch.equal(left == -1, right == -1)
    assert bool((left == -1).any())


def test_a_scale_that_nobody_keeps():
    quantizer, (x,) = prefix(), leaves(normal(2, 6, 4, 4))
    out = quantizer(x, depths=torch.tensor([1, 2]))
    out.loss.backward()
    assert out.loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"update": "ema"}, {"entropy_weight": 0.1}, {"kmeans_init": True}])
def test_dropped_scales_are_searched_and_counted(options):
    """State, entropy and usage are those of all scales, as a plain quantizer sees them."""
    a, b, x = prefix(**options), prefix(**options), normal(6, 6, 4, 4)
    torch.manual_seed(0)
    dropped = a(x, depths=torch.tensor([1, 2, 3, 4, 5, 5]))
    torch.manual_seed(0)
    whole = MultiScaleQuantizer.forward(b, x)
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    assert torch.equal(a.quantizer.codebook.hits, b.quantizer.codebook.hits)
    assert bool(((dropped.indices == whole.indices) | (dropped.indices == -1)).all())
    if "entropy_weight" in options:
        plain = prefix()
        entropy = whole.loss - MultiScaleQuantizer.forward(plain, x).loss
        assert_near(dropped.loss - plain(x, depths=torch.tensor([1, 2, 3, 4, 5, 5])).loss, entropy, 1e-4)
