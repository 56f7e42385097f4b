"""What every module of the related papers has in common: shapes, decode, state, precision, compilation, bad input."""

import copy
import io
import warnings

import pytest
import torch
from harness import assert_near, assert_sentence, compiled, leaves, normal, same_bits
from related import FLAT, KINDS, MAPS, build, features
from torch.utils.checkpoint import checkpoint

from tokenflow_ext.quantize import (
    AttentionQuantizer,
    IndexPropagationQuantizer,
    MultiScaleQuantizer,
    PrefixMultiScaleQuantizer,
    ProductQuantizer,
    ProjectedQuantizer,
    ResidualQuantizer,
    SharedIndexQuantizer,
    SignQuantizer,
    SoftMultiScaleQuantizer,
    VectorQuantizer,
)
from tokenflow_ext.quantize._codebook import Codebook


def state(module):
    return {name: t.clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def changed(module, before):
    return {name for name, t in state(module).items() if not torch.equal(t, before[name])}


def objective(out):
    """Something of output and loss whose gradient does not cancel on the sphere."""
    return out.quantized.sin().sum() + out.loss


def hits(module):
    counts = [m.hits for m in module.modules() if isinstance(getattr(m, "hits", None), torch.Tensor)]
    return sum(int(t.sum()) for t in counts)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_is_forward_bit_for_bit(kind):
    quantizer, x = build(kind).eval(), features(kind)
    before = state(quantizer)
    out = quantizer(x)
    assert out.quantized.shape == x.shape and out.quantized.dtype == x.dtype and out.loss.shape == ()
    assert out.indices.dtype == torch.int64
    assert same_bits(quantizer.decode(out.indices), out.quantized)
    assert torch.equal(quantizer.encode(x), out.indices)
    assert out.loss > 0 and quantizer.usage() == 0 and not changed(quantizer, before)


@pytest.mark.parametrize("kind", FLAT)
def test_channel_dim(kind):
    if kind.startswith("product"):
        pytest.skip("its branches have the keyword")
    last, second = build(kind).eval(), build(kind, channel_dim=1).eval()
    x = normal(2, 8, 3, 5, seed=2)
    a, b = last(x.movedim(1, -1)), second(x)
    assert torch.equal(a.indices, b.indices) and same_bits(a.quantized.movedim(-1, 1), b.quantized)
    assert same_bits(second.decode(b.indices), b.quantized) and torch.equal(second.encode(x), b.indices)


@pytest.mark.parametrize("kind", KINDS)
def test_usage_moves_in_training_only(kind):
    quantizer, x = build(kind), features(kind)
    quantizer(x)
    assert 0 < quantizer.usage() <= 1 and quantizer.perplexity() > 1
    quantizer.reset_usage()
    assert quantizer.usage() == 0 == hits(quantizer) and quantizer.perplexity() == 0
    before = state(quantizer)
    quantizer.encode(x)
    assert not changed(quantizer, before), "encode in training changes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_freeze(kind):
    quantizer, (x,) = build(kind), leaves(features(kind))
    out = quantizer(x)
    objective(out).backward()
    assert x.grad.isfinite().all() and x.grad.any()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    quantizer.freeze()
    before = state(quantizer)
    (x,) = leaves(features(kind, seed=2))
    quantizer(x).loss.backward()
    assert x.grad.any()
    assert all(name.endswith("hits") for name in changed(quantizer, before))
    assert not any(t.requires_grad for t in quantizer.codebooks())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite(kind):
    """They get NaN, and nothing else sees them: loss's denominator stays, codebooks and the other rows' gradients too."""
    quantizer, x = build(kind), features(kind)
    for value in (float("nan"), float("inf")):
        spoilt = x.clone()
        if kind in MAPS:
            spoilt[1, 2, 0, 0] = value
            mine = torch.tensor([True, False, True, True, True, True])
        else:
            spoilt[1, 2, 3] = value
            mine = torch.ones(6, 7, dtype=torch.bool)
            mine[1, 2] = False
        (leaf,) = leaves(spoilt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = quantizer(leaf)
        assert out.quantized[mine].isfinite().all() and out.loss.isfinite()
        assert out.quantized[~mine].isnan().any() and not out.quantized[~mine].isinf().any()
        quantizer.zero_grad()
        (torch.where(out.quantized.isnan(), 0.0, out.quantized).square().sum() + out.loss).backward()
        assert leaf.grad.isfinite().all()
        for name, tensor in quantizer.named_parameters():
            assert tensor.grad is None or tensor.grad.isfinite().all(), name
        assert all(t.isfinite().all() for t in state(quantizer).values())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite_are_told_of_once(kind):
    """Once by each codebook, not by every op of every step."""
    quantizer, x = build(kind, entropy_weight=0.1), features(kind)
    x[1] = float("nan")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            quantizer(x)
    books = [m for m in quantizer.modules() if isinstance(m, (Codebook, SignQuantizer))]
    assert len(told) == len(books) and all("non_finite_rows" in str(t.message) for t in told), [
        str(t.message) for t in told
    ]


@pytest.mark.parametrize("kind", ["soft_multiscale", "soft_multiscale_ibq", "prefix"])
def test_every_scale_counts_its_rows(kind):
    quantizer, x = build(kind), features(kind)
    x[1, 2, 0, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            checkpoint(quantizer, x.requires_grad_(), use_reentrant=False).loss.backward()
    assert torch.equal(quantizer.scale_hits.sum(0), quantizer.quantizer.codebook.hits[0])
    # The first scale's one row holds the whole map, so that a pixel spoils its image at every scale.
    assert quantizer.scale_hits.sum(1).tolist() == [2 * 5 * h * w for h, w in quantizer.scales]
    assert (quantizer.usage(per="scale") > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_one(kind):
    quantizer = build(kind)
    (x,) = leaves(features(kind)[:0])
    out = quantizer(x)
    assert out.quantized.shape == x.shape and out.loss == 0
    (out.quantized.sum() + out.loss).backward()
    assert x.grad.shape == x.shape and hits(quantizer) == 0
    one = quantizer.eval()(features(kind)[:1])
    whole = quantizer(features(kind))
    assert torch.equal(one.indices, whole.indices[:1]) and same_bits(one.quantized, whole.quantized[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_half_and_autocast_keep_float32_tokens(kind):
    quantizer, x = build(kind).eval(), features(kind).bfloat16()
    before, expected = state(quantizer), quantizer(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(x)
        assert torch.equal(out.indices, expected.indices) and out.loss.dtype == torch.float32
        assert torch.equal(quantizer.encode(x), expected.indices)
        assert same_bits(quantizer.decode(out.indices), expected.quantized)
    half = copy.deepcopy(quantizer).half()
    assert not changed(half, before), "codebooks and what projects them stay float32"
    out = half(x)
    assert torch.equal(out.indices, expected.indices)
    assert out.quantized.dtype == torch.bfloat16 and torch.equal(out.quantized, expected.quantized.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    quantizer, x = build(kind), features(kind)
    quantizer(x)
    saved = io.BytesIO()
    torch.save(quantizer, saved)
    saved.seek(0)
    fresh = KINDS[kind](backend="native")
    fresh.load_state_dict(quantizer.state_dict())
    expected = quantizer.eval()(x)
    for other in (copy.deepcopy(quantizer), torch.load(saved, weights_only=False), fresh):
        assert same_bits(other.eval()(x).quantized, expected.quantized)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_in_half_precision_is_read_in_full(kind):
    """Whether its numbers are copied or its tensors taken, what chooses codes goes on in float32."""
    saved = build(kind).state_dict()
    half = {name: t.half() if t.is_floating_point() else t for name, t in saved.items()}
    for assign in (False, True):
        quantizer = build(kind)
        quantizer.load_state_dict(half, assign=assign)
        for name, tensor in quantizer.state_dict().items():
            assert tensor.dtype == saved[name].dtype and torch.equal(tensor, half[name].to(tensor.dtype)), name


@pytest.mark.parametrize("kind", KINDS)
def test_reference_backend(kind):
    native, (x,) = build(kind), leaves(features(kind))
    torch.manual_seed(5)
    twin, (y,) = KINDS[kind](backend="reference"), leaves(features(kind))
    outs = []
    for quantizer, leaf in ((native, x), (twin, y)):
        torch.manual_seed(3)
        out = quantizer(leaf)
        objective(out).backward()
        outs.append(out)
    assert torch.equal(outs[0].indices, outs[1].indices)
    assert_near(outs[0].quantized, outs[1].quantized, 1e-5)
    assert_near(outs[0].loss, outs[1].loss, 1e-5)
    assert_near(x.grad, y.grad, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind):
    quantizer = build(kind).eval()
    exact = copy.deepcopy(quantizer).double()
    a, b = quantizer(features(kind)), exact(features(kind).double())
    assert b.quantized.dtype == b.loss.dtype == torch.float64
    assert torch.equal(a.indices, b.indices)
    assert_near(a.quantized, b.quantized, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_counts_once(kind):
    plain, again, (x,) = build(kind), build(kind), leaves(features(kind))
    (y,) = leaves(x)
    torch.manual_seed(2)
    out = plain(x)
    objective(out).backward()
    torch.manual_seed(2)

    def step(rows):
        out = again(rows)
        return objective(out)

    checkpoint(step, y, use_reentrant=False).backward()
    if kind != "sphere_mean":  # its codes have moved by then
        assert_near(y.grad, x.grad, 1e-6)
    assert hits(again) == hits(plain) > 0


@pytest.mark.parametrize("kind", ["ibq", "projected", "residual", "spherical", "product", "soft_multiscale", "prefix"])
def test_compiles_as_one_graph(kind):
    """The others are made of these, or of VectorQuantizer."""
    plain, traced, (x,) = build(kind), build(kind), leaves(features(kind))
    (y,) = leaves(x)

    def step(quantizer):
        def run(x):
            out = quantizer(x)
            return out.indices, objective(out)

        return run

    if kind == "prefix":  # the compiler's generator is another one
        plain.dropped = traced.dropped = 0.0
    ids, total = step(plain)(x)
    total.backward()
    traced_ids, traced_total = compiled(step(traced))(y)
    traced_total.backward()
    assert torch.equal(traced_ids, ids) and hits(traced) == hits(plain)
    assert_near(traced_total, total, 1e-5)
    assert_near(y.grad, x.grad, 1e-5)


def test_prefixes_compile_as_one_graph():
    quantizer, (x,) = build("prefix"), leaves(features("prefix"))
    out = compiled(quantizer)(x)
    objective(out).backward()
    assert bool((out.indices == -1).any()) and x.grad.isfinite().all()
    assert_near(quantizer.decode(out.indices), out.quantized, 1e-6)


@pytest.mark.parametrize("kind", ["residual", "soft_multiscale"])
def test_exports_with_a_dynamic_batch(kind):
    quantizer, x = build(kind).eval(), features(kind)
    ids = quantizer.encode(x)
    for name, given in (("encode", x), ("decode", ids)):

        class Route(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.quantizer = quantizer

            def forward(self, value):
                return getattr(self.quantizer, name)(value)

        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        program = torch.export.export(Route(), (given,), dynamic_shapes=(batch,))
        assert torch.equal(program.module()(given[:3]), Route()(given[:3]))


TABLE = torch.randn(10, 4)
BAD = [
    (ValueError, "IndexPropagationQuantizer", "dim", lambda: IndexPropagationQuantizer(0, 9)),
    (TypeError, "IndexPropagationQuantizer", "dim", lambda: IndexPropagationQuantizer(2.0, 9)),
    (ValueError, "IndexPropagationQuantizer", "codebook_size", lambda: IndexPropagationQuantizer(4, 0)),
    (ValueError, "IndexPropagationQuantizer", "codebook_weight", lambda: IndexPropagationQuantizer(4, 9, codebook_weight=-1)),
    (ValueError, "IndexPropagationQuantizer", "entropy_temperature", lambda: IndexPropagationQuantizer(4, 9, entropy_temperature=0)),
    (ValueError, "IndexPropagationQuantizer", "backend", lambda: IndexPropagationQuantizer(4, 9, backend="cuda")),
    (ValueError, "IndexPropagationQuantizer", "x", lambda: IndexPropagationQuantizer(4, 9)(torch.randn(2, 5))),
    (TypeError, "IndexPropagationQuantizer", "x", lambda: IndexPropagationQuantizer(4, 9)(torch.ones(2, 4, dtype=torch.int64))),
    (ValueError, "AttentionQuantizer", "key_dim", lambda: AttentionQuantizer(4, 9, key_dim=0)),
    (ValueError, "AttentionQuantizer", "norm", lambda: AttentionQuantizer(4, 9, norm="batch")),
    (ValueError, "AttentionQuantizer", "norm", lambda: AttentionQuantizer(4, 9, norm=["rms"])),
    (ValueError, "AttentionQuantizer", "norm_eps", lambda: AttentionQuantizer(4, 9, norm_eps=-1.0)),
    (ValueError, "SoftMultiScaleQuantizer", "quantizer", lambda: SoftMultiScaleQuantizer(VectorQuantizer(4, 9), (1, 2))),
    (ValueError, "SoftMultiScaleQuantizer", "scales", lambda: SoftMultiScaleQuantizer(IndexPropagationQuantizer(4, 9), ())),
    (ValueError, "SoftMultiScaleQuantizer", "scales", lambda: SoftMultiScaleQuantizer(IndexPropagationQuantizer(4, 9), (1, 5))(torch.randn(1, 4, 4, 4))),
    (ValueError, "SoftMultiScaleQuantizer", "rule", lambda: SoftMultiScaleQuantizer(IndexPropagationQuantizer(4, 9), (1, 2)).inputs(torch.zeros(1, 1, dtype=torch.int64), "chain")),
    (ValueError, "SoftMultiScaleQuantizer", "features", lambda: SoftMultiScaleQuantizer(IndexPropagationQuantizer(4, 9), (1,))(torch.randn(1, 5, 4, 4))),
    (ValueError, "MultiScaleQuantizer", "quantizer", lambda: MultiScaleQuantizer(IndexPropagationQuantizer(4, 9), (1, 2))),
    (ValueError, "MultiScaleQuantizer", "quantizer", lambda: MultiScaleQuantizer(VectorQuantizer(4, 9, gradient="rotation"), (1, 2))),
    (ValueError, "PrefixMultiScaleQuantizer", "dropped", lambda: PrefixMultiScaleQuantizer(VectorQuantizer(4, 9), (1, 2), dropped=2)),
    (ValueError, "PrefixMultiScaleQuantizer", "min_depth", lambda: PrefixMultiScaleQuantizer(VectorQuantizer(4, 9), (1, 2), dropped=0.5, min_depth=3)),
    (ValueError, "PrefixMultiScaleQuantizer", "depths", lambda: PrefixMultiScaleQuantizer(VectorQuantizer(4, 9), (1, 2), dropped=0.5)(torch.randn(2, 4, 2, 2), torch.tensor([1]))),
    (ValueError, "PrefixMultiScaleQuantizer", "depths", lambda: PrefixMultiScaleQuantizer(VectorQuantizer(4, 9), (1, 2), dropped=0.5)(torch.randn(2, 4, 2, 2), torch.tensor([1, 3]))),
    (ValueError, "PrefixMultiScaleQuantizer", "depths", lambda: PrefixMultiScaleQuantizer(VectorQuantizer(4, 9), (1, 2), dropped=0.5)(torch.randn(2, 4, 2, 2), torch.tensor([0, 1]))),
    (ValueError, "PrefixMultiScaleQuantizer", "features", lambda: PrefixMultiScaleQuantizer(VectorQuantizer(4, 9), (1, 2), dropped=0.5).eval()(torch.randn(2, 4, 2))),
    (TypeError, "PrefixMultiScaleQuantizer", "depths", lambda: PrefixMultiScaleQuantizer(VectorQuantizer(4, 9), (1, 2), dropped=0.5)(torch.randn(2, 4, 2, 2), torch.ones(2))),
    (ValueError, "ProductQuantizer", "quantizers", lambda: ProductQuantizer([])),
    (ValueError, "ProductQuantizer", "quantizers", lambda: ProductQuantizer([VectorQuantizer(4, 9), SharedIndexQuantizer((4,), 9)])),
    (ValueError, "ProductQuantizer", "quantizers", lambda: ProductQuantizer([VectorQuantizer(4, 9), VectorQuantizer(4, 9, channel_dim=1)])),
    (ValueError, "ProductQuantizer", "disentangle_weight", lambda: ProductQuantizer([VectorQuantizer(4, 9), VectorQuantizer(5, 9)], disentangle_weight=0.1)),
    (TypeError, "ProductQuantizer", "joined", lambda: ProductQuantizer([VectorQuantizer(4, 9)], joined="no")),
    (ValueError, "ProductQuantizer", "per", lambda: ProductQuantizer([VectorQuantizer(4, 9)]).usage("group")),
    (ValueError, "ProductQuantizer", "x", lambda: ProductQuantizer([VectorQuantizer(4, 9)] * 2, joined=False)([torch.randn(2, 4)])),
    (ValueError, "ProductQuantizer", "x", lambda: ProductQuantizer([VectorQuantizer(4, 9)] * 2)(torch.randn(2, 4))),
    (ValueError, "ProductQuantizer", "indices", lambda: ProductQuantizer([VectorQuantizer(4, 9)] * 2).decode(torch.zeros(3, 3, dtype=torch.int64))),
    (ValueError, "ProjectedQuantizer", "table", lambda: ProjectedQuantizer(torch.randn(3), 4)),
    (ValueError, "ProjectedQuantizer", "window", lambda: ProjectedQuantizer(TABLE, 4, window=(3, 11))),
    (TypeError, "ProjectedQuantizer", "window", lambda: ProjectedQuantizer(TABLE, 4, window=7)),
    (TypeError, "ProjectedQuantizer", "projection", lambda: ProjectedQuantizer(TABLE, 4, projection=lambda t: t)),
    (ValueError, "ProjectedQuantizer", "projection", lambda: ProjectedQuantizer(TABLE, 5, projection=torch.nn.Identity())(torch.randn(2, 5))),
    (ValueError, "ResidualQuantizer", "depth", lambda: ResidualQuantizer(4, 9, 0)),
    (TypeError, "ResidualQuantizer", "shared", lambda: ResidualQuantizer(4, 9, 2, shared="no")),
    (ValueError, "ResidualQuantizer", "quantizer_dropout", lambda: ResidualQuantizer(4, 9, 2, quantizer_dropout=1.5)),
    (TypeError, "ResidualQuantizer", "metric", lambda: ResidualQuantizer(4, 9, 2, metric="cosine")),
    (ValueError, "ResidualQuantizer.decode", "indices", lambda: ResidualQuantizer(4, 9, 2).decode(torch.zeros(3, 3, dtype=torch.int64))),
    (ValueError, "SignQuantizer", "dim", lambda: SignQuantizer(63)),
    (ValueError, "SignQuantizer", "entropy_temperature", lambda: SignQuantizer(4, entropy_temperature=0.0)),
    (ValueError, "SignQuantizer", "entropy_temperature", lambda: SignQuantizer(4, entropy_temperature=float("inf"))),
    (TypeError, "SignQuantizer", "spherical", lambda: SignQuantizer(4, spherical="no")),
    (ValueError, "SignQuantizer", "x", lambda: SignQuantizer(4)(torch.randn(2, 5))),
    (ValueError, "VectorQuantizer", "gradient", lambda: VectorQuantizer(4, 9, gradient="none")),
    (ValueError, "SharedIndexQuantizer", "gradient", lambda: SharedIndexQuantizer((4,), 9, gradient="none")),
    (ValueError, "VectorQuantizer", "normalize_mean", lambda: VectorQuantizer(4, 9, normalize_mean=True)),
]  # fmt: skip


@pytest.mark.parametrize("error, name, argument, call", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_a_sentence(error, name, argument, call):
    assert_sentence(error, name, argument, call)
