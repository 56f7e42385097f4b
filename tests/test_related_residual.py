"""Residual VQ, VQ-KD's averages, projected tables with windows, perturbed codes: against dense float64 and the paper's rules."""

import pytest
import torch
from harness import METRICS, assert_gradients, assert_near, assert_sentence, leaves, near_ties, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import ops
from tokenflow_ext.quantize import (
    MultiScaleQuantizer,
    ProjectedQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    perturb_codes,
)


def build(shared=False, depth=3, **options):
    torch.manual_seed(5)
    return ResidualQuantizer(6, 30, depth, shared=shared, backend="native", **options)


@pytest.mark.parametrize("shared", [False, True])
def test_residual_is_dense(shared):
    quantizer, (x,), upstream = (
        build(shared, commitment_weight=0.3, codebook_weight=0.7),
        leaves(normal(40, 6)),
        normal(40, 6, seed=2),
    )
    out = quantizer(x)
    z, *tables = leaves(x.double(), *(t.double() for t in quantizer.codebooks()))
    r, f, loss, ids = z.detach(), 0, 0, []
    for d in range(3):
        table = tables[0 if shared else d]
        ids.append(torch.cdist(r, table).argmin(-1))
        f, r = f + table[ids[-1]], r - table[ids[-1]].detach()
        loss = loss + (0.7 * (f - z.detach()).square().mean() + 0.3 * (f.detach() - z).square().mean()) / 3
    assert torch.equal(out.indices, torch.stack(ids, -1))
    assert_near(out.quantized, f, 1e-6)
    assert_near(out.loss, loss, 1e-5)
    (passed,) = torch.autograd.grad((out.quantized * upstream).sum(), x, retain_graph=True)
    assert same_bits(passed, upstream)
    actual = torch.autograd.grad(out.loss, [x, *quantizer.codebooks()])
    assert_gradients(actual, torch.autograd.grad(loss, [z, *tables]), 1e-5)


def test_shared_residual_is_multiscale_on_one_pixel():
    """With one codebook a level is a scale of a map of one pixel, the loss on accumulated maps."""
    quantizer, x = build(shared=True), normal(40, 6)
    inner = VectorQuantizer(6, 30, metric="l2")
    inner.codebook.table_0.data.copy_(quantizer.codebooks()[0])
    (a,), (b,) = leaves(x), leaves(x)
    expected = MultiScaleQuantizer(inner, (1, 1, 1), loss_on="accumulated")(b[:, :, None, None])
    out = quantizer(a)
    assert torch.equal(out.indices, expected.indices)
    assert_near(out.quantized, expected.quantized.flatten(1), 1e-6)
    assert_near(out.loss, expected.loss, 1e-6)
    out.loss.backward()
    expected.loss.backward()
    assert_gradients([a.grad, quantizer.codebooks()[0].grad], [b.grad, inner.codebooks()[0].grad], 1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_prefix_decode(shared):
    quantizer, x = build(shared).eval(), normal(2, 5, 6)
    ids, f = quantizer.encode(x), torch.zeros(2, 5, 6)
    assert same_bits(quantizer.decode(ids[..., :0]), f)
    for d in range(3):
        f = f + quantizer.codebooks()[0 if shared else d][ids[..., d]]
        assert same_bits(quantizer.decode(ids[..., : d + 1]), f)
        dropped = ids.clone()
        dropped[..., d + 1 :] = -1
        assert same_bits(quantizer.decode(dropped), f)


def test_quantizer_dropout():
    quantizer, x = build(quantizer_dropout=1.0), normal(40, 6)
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        out = quantizer(x)
        depth = int((out.indices[0] >= 0).sum())
        assert bool((out.indices[:, :depth] >= 0).all()) and bool((out.indices[:, depth:] == -1).all())
        assert same_bits(out.quantized, quantizer.decode(out.indices[:, :depth]))
        assert same_bits(out.quantized, quantizer.decode(out.indices))
        seen.add(depth)
    assert seen == {1, 2, 3}
    assert bool((quantizer.eval()(x).indices >= 0).all())


@pytest.mark.parametrize("shared", [False, True])
def test_residual_average_and_kmeans(shared):
    """EMA and k-means see each level's residual; shared, one update of all levels' rows."""
    quantizer, x = build(shared, update="ema", decay=0.7), normal(40, 6)
    before = [t.clone() for t in quantizer.codebooks()]
    ids = quantizer(x).indices
    r, rows = x, []
    for d in range(3):
        rows.append(r)
        r = r - before[0 if shared else d][ids[:, d]]
    groups = [(torch.cat(rows), ids.T.reshape(-1))] if shared else [(rows[d], ids[:, d]) for d in range(3)]
    for old, new, (part, chosen) in zip(before, quantizer.codebooks(), groups, strict=True):
        ops.ema_update_(
            old, torch.ones(30), old.clone(), *ops.code_statistics(part, chosen, 30), decay=0.7, metric="l2"
        )
        assert_near(new, old, 1e-6)
    placed = build(shared, kmeans_init=True)
    assert placed(x).loss < (0.8 if shared else 0.5) * build(shared)(x).loss


@pytest.mark.parametrize("shared", [False, True])
def test_residual_entropy(shared):
    options = {"entropy_weight": 0.2, "entropy_temperature": 0.5}
    quantizer, plain, x = build(shared, **options), build(shared), normal(40, 6)
    out, r, expected = quantizer(x), x, 0
    for d in range(3):
        table = quantizer.codebooks()[0 if shared else d]
        first, second = ops.entropy_loss(r, table, metric="l2", temperature=0.5)
        expected, r = expected + 0.2 / 3 * (first - second), r - table[out.indices[:, d]]
    assert_near(out.loss - plain(x).loss, expected, 1e-4)


def test_sphere_mean():
    """VQ-KD: E <- unit(decay E + (1 - decay) unit(mean of its unit rows)), step after step; empty codes stay."""
    torch.manual_seed(5)
    quantizer = VectorQuantizer(6, 30, groups=2, update="ema", normalize_mean=True, decay=0.8)
    table = quantizer.codebooks()[0].double()
    for seed in range(4):
        x = normal(25, 6, seed=seed)
        ids, before = quantizer(x).indices, table.clone()
        unit = torch.nn.functional.normalize(x.double().unflatten(-1, (2, 3)), dim=-1)
        for g in range(2):
            for k in range(30):
                mine = unit[ids[:, g] == k, g]
                if len(mine):
                    mean = torch.nn.functional.normalize(mine.mean(0), dim=0)
                    table[g, k] = torch.nn.functional.normalize(0.8 * before[g, k] + 0.2 * mean, dim=0)
        assert_near(quantizer.codebooks()[0], table, 1e-6)
        stayed = torch.stack([ids[:, g].bincount(minlength=30) == 0 for g in range(2)])
        assert stayed.any() and not stayed.all()


@pytest.mark.parametrize("metric", METRICS)
def test_window(metric):
    """Ids are those of a dense search whose other codes are out of reach; the table rests, the projection learns."""
    torch.manual_seed(5)
    words, x = normal(80, 16, seed=3).requires_grad_(), normal(500, 6)
    quantizer = ProjectedQuantizer(words, 6, window=(20, 65), metric=metric, backend="native")
    out = quantizer(x)
    projection = quantizer.codebook.projection
    codes = projection(words).detach()
    expected = torch.full_like(codes, float("nan")).index_copy(0, torch.arange(20, 65), codes[20:65])
    near_ties(out.indices, ops.nearest_code(x, expected, metric=metric), [x], [codes], metric)
    assert 20 <= int(out.indices.min()) and int(out.indices.max()) < 65
    out.loss.backward()
    assert projection.weight.grad.any() and projection.bias.grad.any()
    assert words.grad is None and not quantizer.codebook.table_0.requires_grad
    assert [name for name, _ in quantizer.named_parameters()] == [
        "codebook.projection.weight",
        "codebook.projection.bias",
    ]
    weight, bias = leaves(projection.weight.double(), projection.bias.double())
    dense = (words.detach().double() @ weight.T + bias)[out.indices]
    y = x.double()
    if metric == "cosine":
        dense, y = (torch.nn.functional.normalize(v, dim=-1) for v in (dense, y))
    loss = (dense - y).square().mean() + 0.25 * (dense.detach() - y).square().mean()
    assert_near(out.loss, loss, 1e-5)
    expected = torch.autograd.grad(loss, [weight, bias])
    assert_gradients([projection.weight.grad, projection.bias.grad], expected, 1e-5)


@settings(max_examples=30, deadline=None)
@given(lo=st.integers(0, 19), size=st.integers(1, 20), seed=st.integers(0, 99))
def test_no_id_outside_the_window(lo, size, seed):
    hi = min(lo + size, 20)
    quantizer = ProjectedQuantizer(normal(20, 5, seed=seed), 3, window=(lo, hi), metric="dot")
    x = 1e3 * normal(30, 3, seed=seed)
    x[0] = 0
    ids = quantizer(x).indices
    assert lo <= int(ids.min()) and int(ids.max()) < hi
    with pytest.raises(ValueError):
        quantizer.decode(torch.tensor([hi]))
    if lo > 0:  # -1 stands for a row that was left out
        with pytest.raises(ValueError):
            quantizer.decode(torch.tensor([lo - 1]))


def test_projection_of_ones_own():
    """Any module, in its own precision after half(); two windows may share it. A projected table serves every scale."""
    torch.manual_seed(5)
    words = normal(80, 16, seed=3)
    shared = torch.nn.Sequential(torch.nn.Linear(16, 6), torch.nn.Tanh())
    nouns, verbs = (ProjectedQuantizer(words, 6, projection=shared, window=w) for w in ((0, 50), (50, 80)))
    (nouns(normal(9, 6)).loss + verbs(normal(9, 6)).loss).backward()
    assert shared[0].weight.grad.any()
    quantizer = MultiScaleQuantizer(ProjectedQuantizer(words, 6, projection=shared), (1, 2, 4))
    out = quantizer(normal(2, 6, 4, 4))
    assert same_bits(quantizer.decode(out.indices), out.quantized)
    out.loss.backward()
    half = nouns.half()
    out = half(normal(9, 6).half())
    assert torch.equal(half.decode(out.indices).half(), out.quantized) and half.codebook.table_0.dtype == torch.float32


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("grouped", [False, True])
def test_perturbed_codes(metric, grouped):
    x = normal(40, 20, 2, 6) if grouped else normal(40, 20, 6)
    codebook = normal(2, 30, 6, seed=2) if grouped else normal(30, 6, seed=2)
    near = ops.nearest_code(x, codebook, metric=metric, topk=5)
    torch.manual_seed(1)
    ids = perturb_codes(x, codebook, neighbours=5, probability=0.5, share=0.75, metric=metric)
    assert torch.equal(ids[30:], near[30:, ..., 0])
    ranks = (near == ids.unsqueeze(-1)).long().argmax(-1)
    assert torch.equal(near.gather(-1, ranks.unsqueeze(-1)).squeeze(-1), ids)
    shares = ranks[:30].flatten().bincount(minlength=5) / ranks[:30].numel()
    assert_near(shares, torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]), 0.1)
    for options in ({"neighbours": 1, "probability": 1.0}, {"neighbours": 5, "probability": 0.0}):
        assert torch.equal(perturb_codes(x, codebook, metric=metric, **options), near[..., 0])


@pytest.mark.parametrize(
    "argument, options",
    [
        ("neighbours", {"neighbours": 0, "probability": 1.0}),
        ("probability", {"neighbours": 2, "probability": 1.1}),
        ("share", {"neighbours": 2, "probability": 1.0, "share": -0.1}),
    ],
)
def test_perturbed_codes_bad_input(argument, options):
    assert_sentence(ValueError, "perturb_codes", argument, perturb_codes, normal(3, 4), normal(5, 4), **options)
