"""Codebooks stay alive: k-means, revival, padding, what is counted, and what one bad batch may not do."""

import copy
import warnings

import pytest
import torch
from harness import METRICS, assert_gradients, assert_near, assert_sentence, compiled, leaves, normal, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflow_ext import ops
from tokenflow_ext.ops import _native
from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer, _codebook, _kmeans
from tokenflow_ext.quantize._codebook import Codebook

NAN, INF = float("nan"), float("inf")
KINDS = {
    "vector": lambda **k: VectorQuantizer(12, 40, **k),
    "groups": lambda **k: VectorQuantizer(12, 40, groups=3, **k),
    "shared": lambda **k: SharedIndexQuantizer((8, 4), 40, weights=(1.0, 3.0), **k),
}
UPDATES = ("gradient", "ema", "none")


def build(kind="vector", **options):
    torch.manual_seed(5)
    return KINDS[kind](backend="native", **options)


def scales(**options):
    """Over grids 1, 2 and 4, and the quantizer's options."""
    own = {
        k: options.pop(k)
        for k in ("loss_on", "scale_weights", "scale_dropout", "normalize_codes", "phi")
        if k in options
    }
    return MultiScaleQuantizer(build("shared", **options), (1, 2, 4), **own)


def state(module):
    found = {name: tensor.detach().clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    return {**found, "hits": module.codebook.hits.clone()}


# k-means


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_kmeans_finds_well_separated_clusters(kind, metric):
    """Rows around 40 centres, of very unequal sizes: nearly every centre gets a code; of 40 plain draws 37 hit four."""
    centres = 3 * normal(40, 12, seed=9)
    sizes = torch.tensor([300] * 4 + [3] * 36)
    x = centres.repeat_interleave(sizes, 0)
    x = x + 0.01 * normal(*x.shape, seed=1)
    quantizer = build(kind, kmeans_init=True, update="none", metric=metric)
    quantizer(x)
    if kind == "groups":  # far centres may be near each other in a group of 4 channels
        assert quantizer.usage() > (0.9 if metric != "dot" else 0.3)
        return
    ids = ops.shared_nearest_code(
        quantizer.codebook._unit(centres, "native").split(quantizer.codebook.widths, -1) if metric == "cosine"
        else centres.split(quantizer.codebook.widths, -1),
        quantizer.codebooks(), metric="l2" if metric == "dot" else metric, weights=quantizer.weights,
    )  # fmt: skip
    assert len(ids.unique()) >= 37
    nearest = quantizer.codebook.joined()[0][ids]
    target = quantizer.codebook._unit(centres, "native") if metric == "cosine" else centres
    assert ((nearest - target).abs().amax(-1) < 0.05).sum() >= 35


def test_kmeans_is_lloyds_fixed_point():
    """Where Lloyd has converged every code is the mean of its rows."""
    x = (10 * normal(8, 6, seed=1)).repeat(20, 1) + 0.1 * normal(160, 6, seed=2)
    quantizer = VectorQuantizer(6, 8, metric="l2", kmeans_init=True, update="none")
    ids = quantizer(x).indices
    means = torch.stack([x[ids == k].mean(0) for k in range(8)])
    assert_near(quantizer.codebooks()[0], means, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_kmeans_with_fewer_rows_than_codes_duplicates_and_nan(kind):
    x = normal(20, 12, seed=1).repeat(2, 1)
    x[3, 5], x[4, 0] = NAN, INF
    quantizer = build(kind, kmeans_init=True, update="none", metric="l2")
    with pytest.warns(RuntimeWarning, match="rows hold NaN"):
        loss = quantizer(x).loss
    assert loss < 1e-10, "every distinct row is a code"
    joined = quantizer.codebook.joined()
    assert joined.isfinite().all() and all(len(g.unique(dim=0)) == 40 for g in joined), "codes left over are no copies"
    alone = build(kind, kmeans_init=True, update="ema")
    alone(torch.ones(1, 12))
    assert all(table.isfinite().all() for table in alone.codebooks())


def test_kmeans_looks_at_a_bounded_sample(monkeypatch):
    seen, placed = [], _codebook.kmeans
    monkeypatch.setattr(_kmeans, "SAMPLE", 100)
    monkeypatch.setattr(_codebook, "kmeans", lambda rows, *rest: seen.append(rows) or placed(rows, *rest))
    x = torch.arange(1.0, 1001)[:, None].expand(-1, 12) * torch.ones(12)
    quantizer = build(kmeans_init=True, metric="l2", update="none")
    quantizer(x)
    rows = seen[0][:, 0, 0]
    assert len(rows) == 100 and (rows.diff() >= 0).all() and rows[0] < 11 and rows[-1] > 989
    assert quantizer.usage() == 1


def test_kmeans_happens_once_and_reads_its_flag_once(monkeypatch):
    quantizer = build(kmeans_init=True, update="none")
    quantizer(normal(50, 12))
    before = state(quantizer)
    monkeypatch.setattr(Codebook, "_kmeans", None)
    quantizer.codebook.needs_init.fill_(True)  # not looked at again ...
    quantizer(normal(60, 12))
    assert same_bits(quantizer.codebooks()[0], before["codebook.table_0"])
    quantizer.load_state_dict(copy.deepcopy(quantizer.state_dict()))  # ... until it is loaded
    with pytest.raises(TypeError):
        quantizer(normal(60, 12))
    assert quantizer.codebook.waits_for_kmeans()


def test_kmeans_in_compiled_training_after_one_step():
    quantizer = build(kmeans_init=True, update="ema")
    quantizer(normal(50, 12))
    assert compiled(lambda x: quantizer(x).loss)(normal(60, 12)).isfinite()


def test_multiscale_kmeans_knows_the_residuals(monkeypatch):
    """The pixels of the map place codes for the loop, whose rows on all scales then place them anew."""
    seen, place = [], _codebook.kmeans
    monkeypatch.setattr(_codebook, "kmeans", lambda rows, *rest: seen.append(len(rows)) or place(rows, *rest))
    x = normal(64, 12, 4, 4, seed=1)
    random, placed = scales(update="none"), scales(update="none", kmeans_init=True)
    random(x), placed(x)
    assert placed.usage() > 0.95 and placed(x).loss < 0.9 * random(x).loss
    assert placed.perplexity() > random.perplexity() and seen == [64 * 16, 64 * 21]


# Revival


def dead(quantizer, count=35):
    """Makes the first codes unreachable."""
    with torch.no_grad():
        for table in quantizer.codebooks():
            table[..., :count, :] = 1e4
    if quantizer.codebook.update == "ema":
        quantizer.codebook.ema_sums.copy_(quantizer.codebook.joined())
    quantizer.codebook.ema_counts[:, :count] = 0.0


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("kind", KINDS)
def test_revival_takes_different_good_rows(kind, update):
    """Dead codes of each group become rows of the batch, no two the same, none from padding or NaN; the averages restart."""
    quantizer = build(kind, update=update, dead_code_threshold=0.5, metric="l2", decay=1.0)
    dead(quantizer)
    x, mask = normal(90, 12, seed=1), torch.ones(90, dtype=torch.bool)
    mask[::3], x[1, 0], x[2, 11] = False, NAN, INF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer(x, mask)
    codebook = quantizer.codebook
    rows = quantizer._flat(x).transpose(0, 1)
    for g in range(codebook.groups):
        good = mask & rows[g].isfinite().all(-1)
        revived = codebook.ema_counts[g, :35] > 0
        same = (codebook.joined()[g, :35, None] == rows[g][None]).all(-1)
        assert revived.sum() > 20 and (same.sum(1) == revived).all() and (same.sum(0) <= 1).all()
        assert not same[:, ~good].any() and (codebook.joined()[g, :35][~revived] == 1e4).all()
        assert (codebook.ema_counts[g, :35][revived] == 1).all()
    if update == "ema":
        assert same_bits(codebook.ema_sums[:, :35], codebook.joined()[:, :35])


def test_revival_prefers_rows_far_from_their_codes():
    """Of a batch that is one picture's background but for a tenth, dead codes take the tenth; a row on its code is never taken."""
    quantizer = build(dead_code_threshold=0.5, metric="l2", decay=1.0)
    dead(quantizer)
    background = quantizer.codebooks()[0][39].detach().clone()
    x = background.repeat(400, 1)
    x[::10] = 3 * normal(40, 12, seed=4)
    quantizer(x)
    revived = quantizer.codebook.ema_counts[0, :35] > 0
    taken = quantizer.codebook.joined()[0, :35][revived]
    assert revived.sum() > 15 and (taken[:, None] == x[::10]).all(-1).any(1).all()
    quantizer(background.repeat(50, 1))
    assert same_bits(quantizer.codebook.joined()[0, :35][revived], taken), "nothing to learn from, nothing taken"


def test_more_dead_codes_than_rows():
    quantizer = build(dead_code_threshold=0.5, metric="l2", decay=1.0)
    dead(quantizer)
    quantizer(normal(7, 12))
    joined = quantizer.codebook.joined()[0].clone()
    revived = (joined[:35] != 1e4).all(-1)
    assert 3 <= revived.sum() <= 7 and torch.equal(revived, quantizer.codebook.ema_counts[0, :35] > 0)
    quantizer(torch.empty(0, 12))
    quantizer(normal(7, 12), torch.zeros(7, dtype=torch.bool))
    assert same_bits(quantizer.codebook.joined()[0], joined)


def test_a_revived_code_is_given_time():
    """A threshold above 1 does not replace the same codes at every step."""
    quantizer = build(dead_code_threshold=3, metric="l2", decay=0.9)
    dead(quantizer)
    quantizer(normal(64, 12, seed=1))
    revived, before = quantizer.codebook.ema_counts[0] > 5, quantizer.codebook.joined().clone()
    quantizer(normal(64, 12, seed=2))
    assert revived.sum() > 20 and same_bits(quantizer.codebook.joined()[0, revived], before[0, revived])


def test_revival_resumes_from_a_checkpoint():
    """The draw goes on where it was; a checkpoint without its counter loads, too."""
    first = build(update="ema", dead_code_threshold=2.0, decay=0.5)
    for step in range(3):
        first(normal(64, 12, seed=step))
    second = build(update="ema", dead_code_threshold=2.0, decay=0.5)
    second.load_state_dict(first.state_dict())
    first(normal(64, 12, seed=9)), second(normal(64, 12, seed=9))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    old = {k: v for k, v in first.state_dict().items() if "revivals" not in k}
    build(update="ema", dead_code_threshold=2.0).load_state_dict(old)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_revival_compiles(update):
    eager, traced = (build(update=update, dead_code_threshold=1.0, decay=0.5) for _ in range(2))
    step = compiled(lambda x: traced(x).loss)
    for seed in range(4):
        x = normal(64, 12, seed=seed)
        assert_near(step(x), eager(x).loss, 1e-6)
    assert_near(traced.codebook.joined(), eager.codebook.joined(), 1e-6)


# Padding


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_are_as_if_absent(kind, update, metric):
    """Values, loss, gradients, statistics and revival equal those of the other rows alone, whatever padding holds."""
    options = {
        "update": update,
        "metric": metric,
        "entropy_weight": 0.1,
        "entropy_temperature": 1.0,
        "kmeans_init": True,
    }
    masked, alone = (build(kind, dead_code_threshold=0.3, decay=0.6, **options) for _ in range(2))
    mask = torch.rand(6, 30, generator=torch.Generator().manual_seed(3)) > 0.3
    for seed in range(3):
        x = normal(6, 30, 12, seed=seed)
        x[~mask] = [NAN, INF, 7.0][seed]
        (a,), (b,) = leaves(x), leaves(x[mask])
        out, expected = masked(a, mask), alone(b)
        assert torch.equal(out.indices[mask], expected.indices) and (out.indices[~mask] == -1).all()
        assert torch.equal(out.quantized[mask], expected.quantized) and not out.quantized[~mask].any()
        assert torch.equal(masked.decode(out.indices), out.quantized) or update != "none"
        assert_near(out.loss, expected.loss, 1e-5)
        weight = normal(6, 30, 12, seed=9)
        got = torch.autograd.grad((out.quantized * weight).sum() + out.loss, [a, *masked.parameters()])
        wanted = torch.autograd.grad(
            (expected.quantized * weight[mask]).sum() + expected.loss, [b, *alone.parameters()]
        )
        assert not got[0][~mask].any()
        assert_gradients([got[0][mask], *got[1:]], wanted, 1e-5)
    for name, value in state(alone).items():
        assert_near(state(masked)[name].double(), value.double(), 1e-5, name)
    assert masked.non_finite_rows() == 0


def test_mask_keeps_the_denominator_of_bad_rows_and_all_or_nothing():
    quantizer, x = build(update="none"), normal(10, 12)
    mask = torch.ones(10, dtype=torch.bool)
    assert_near(quantizer(x, mask).loss, quantizer(x).loss, 1e-6)
    spoiled = x.clone()
    spoiled[4] = NAN
    with pytest.warns(RuntimeWarning):
        out, plain = quantizer(spoiled, mask), quantizer(spoiled)
    assert_near(out.loss, plain.loss, 1e-6)
    assert out.quantized[4].isnan().all() and out.indices[4] == 0
    assert quantizer(x, ~mask).loss == 0 and quantizer(torch.empty(0, 12), mask[:0]).loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_mask_types_and_channel_dim(dtype):
    quantizer, x = build("groups", channel_dim=1), normal(2, 12, 3, 4, dtype=dtype)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2] = False
    out, plain = quantizer(x, mask), quantizer(x)
    assert out.quantized.dtype == dtype and out.loss.dtype == plain.loss.dtype
    assert torch.equal(out.indices[mask], plain.indices[mask])
    assert torch.equal(out.quantized, plain.quantized * mask[:, None])


@pytest.mark.parametrize("metric", METRICS)
def test_masked_loss_in_float64(metric):
    """Against the twin's formula, values and gradients."""
    quantizer = build("shared", metric=metric, commitment_weight=0.3).double()
    mask, (x,) = torch.arange(20) % 3 != 0, leaves(normal(20, 12, dtype=torch.float64))
    out = quantizer(x, mask)
    twin = build("shared", metric=metric, commitment_weight=0.3).double()
    twin.backend = "reference"
    (y,) = leaves(x)
    expected = twin(y[mask])
    assert_near(out.loss, expected.loss, 1e-12)
    got = torch.autograd.grad(out.loss, [x, *quantizer.parameters()])
    assert_gradients(got, torch.autograd.grad(expected.loss, [y, *twin.parameters()]), 1e-10)


def test_mask_compiles():
    quantizer, x = build(update="ema"), normal(30, 12)
    mask = torch.arange(30) % 4 != 0
    traced = build(update="ema")
    assert_near(compiled(lambda x, m: traced(x, m).loss)(x, mask), quantizer(x, mask).loss, 1e-6)
    assert_near(traced.codebook.joined(), quantizer.codebook.joined(), 1e-6)


PHI = (0.1 * normal(2, 12, 12, 3, 3), 0.1 * normal(2, 12), 0.5, [0, 1, 1])
LOOPS = {
    "codes": {},
    "l2": {"metric": "l2"},
    "raw codes": {"normalize_codes": False},
    "accumulated": {"loss_on": "accumulated", "metric": "l2"},
    "phi": {"loss_on": "accumulated", "phi": PHI},
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("loop", LOOPS)
def test_masked_images_are_as_if_absent(loop, update):
    options = {"update": update, "kmeans_init": True, "dead_code_threshold": 0.3, "entropy_weight": 0.1, **LOOPS[loop]}
    masked, alone = scales(**options), scales(**options)
    mask = torch.tensor([True, False, True, True, False])
    for seed in range(2):
        x = normal(5, 12, 4, 4, seed=seed)
        x[~mask] = [NAN, 7.0][seed]
        (a,), (b,) = leaves(x), leaves(x[mask])
        out, expected = masked(a, mask), alone(b)
        assert torch.equal(out.indices[mask], expected.indices) and (out.indices[~mask] == -1).all()
        assert torch.equal(out.quantized[mask], expected.quantized) and not out.quantized[~mask].any()
        assert torch.equal(masked.decode(out.indices)[mask], expected.quantized) or update != "none"
        assert_near(out.loss, expected.loss, 1e-5)
        got = torch.autograd.grad(out.quantized.square().sum() + out.loss, [a, *masked.parameters()])
        wanted = torch.autograd.grad(expected.quantized.square().sum() + expected.loss, [b, *alone.parameters()])
        assert not got[0][~mask].any()
        assert_gradients([got[0][mask], *got[1:]], wanted, 1e-5)
    for name, value in state(alone.quantizer).items():
        assert_near(state(masked.quantizer)[name].double(), value.double(), 1e-5, name)
    assert torch.equal(masked.scale_hits, alone.scale_hits)


def test_bad_masks():
    for module, x, shape in ((build(), normal(4, 12), [4]), (scales(), normal(4, 12, 4, 4), [4])):
        name = type(module).__name__
        assert_sentence(TypeError, name, "mask", module, x, torch.ones(4))
        assert_sentence(TypeError, name, "mask", module, x, [True] * 4)
        assert_sentence(ValueError, name, "mask", module, x, torch.ones(5, dtype=torch.bool))
        assert_sentence(ValueError, name, "mask", module, x, torch.ones(4, 1, dtype=torch.bool))


# Weights of scales


@pytest.mark.parametrize("loop", LOOPS)
def test_scale_weights(loop):
    """Equal weights are the plain mean, values and gradients; a single one is the loss of its scale."""
    options = {"kmeans_init": False, **LOOPS[loop]}
    plain, even = scales(**options), scales(**options, scale_weights=(2, 2, 2))
    (a,), (b,) = leaves(normal(3, 12, 4, 4, seed=1)), leaves(normal(3, 12, 4, 4, seed=1))
    out, expected = even(a), plain(b)
    assert same_bits(out.quantized, expected.quantized) and torch.equal(out.indices, expected.indices)
    assert_near(out.loss, expected.loss, 1e-6)
    got = torch.autograd.grad(out.quantized.square().sum() + out.loss, [a, *even.parameters()])
    wanted = torch.autograd.grad(expected.quantized.square().sum() + expected.loss, [b, *plain.parameters()])
    assert_gradients(got, wanted, 1e-5)
    single = [scales(**options, scale_weights=[float(s == t) for t in range(3)])(a).loss for s in range(3)]
    mixed = scales(**options, scale_weights=(1, 2, 5)).eval()(a).loss
    assert_near(sum(single) / 3, expected.loss, 1e-6)
    assert_near((single[0] + 2 * single[1] + 5 * single[2]) / 8, mixed, 1e-6)


def test_scale_weights_of_the_scales_left():
    x = normal(2, 12, 4, 4)
    for seed in range(6):
        dropped = scales(scale_weights=(1, 0, 0), scale_dropout=1.0, update="none")
        torch.manual_seed(seed)
        assert_near(dropped(x).loss, scales(scale_weights=(1, 0, 0), update="none")(x).loss, 1e-6)
    for weights, error in (((1, 2), ValueError), ((0, 0, 0), ValueError), ((1, -1, 1), ValueError), (3, TypeError)):
        assert_sentence(error, "MultiScaleQuantizer", "scale_weights", scales, scale_weights=weights)


# What is counted


def test_usage_and_perplexity_of_each_group_and_scale():
    grouped, x = build("groups", update="none"), normal(50, 12)
    ids = grouped(x).indices
    assert_near(grouped.usage("group"), torch.tensor([len(i.unique()) for i in ids.T]).double() / 40, 1e-12)
    assert grouped.usage() == pytest.approx(grouped.usage("group").mean().item())
    assert grouped.perplexity() == pytest.approx(grouped.perplexity("group").mean().item())
    several = scales(update="none")
    maps = several.split(several(normal(9, 12, 4, 4)).indices)
    several(normal(9, 12, 4, 4))
    assert_near(several.usage("scale"), torch.tensor([len(m.unique()) for m in maps]).double() / 40, 1e-12)
    shares = [m.flatten().bincount().double() / m.numel() for m in maps]
    assert_near(several.perplexity("scale"), torch.stack([torch.special.entr(s).sum().exp() for s in shares]), 1e-9)
    assert torch.equal(several.scale_hits.sum(0), several.quantizer.codebook.hits[0])
    several.eval()(normal(3, 12, 4, 4))
    assert int(several.scale_hits.sum()) == 2 * 9 * 21
    several.reset_usage()
    assert several.usage() == 0 and not several.usage("scale").any() and not several.perplexity("scale").any()
    assert_sentence(ValueError, "VectorQuantizer", "per", grouped.usage, "scale")
    assert_sentence(ValueError, "MultiScaleQuantizer", "per", several.perplexity, "group")


def test_counts_move_and_copy_with_the_module():
    several = scales(update="ema")
    several(normal(3, 12, 4, 4))
    copied = copy.deepcopy(several).half()
    assert torch.equal(copied.scale_hits, several.scale_hits) and copied.usage() == several.usage()
    assert copied.quantizer.codebook.hits.dtype == torch.int64
    with torch.device("meta"):
        blank = scales()
    blank = blank.to_empty(device="cpu")
    assert blank.usage() == 0 and not blank.scale_hits.any() and blank.non_finite_rows() == 0


def test_collapse_is_told_once():
    x = normal(1, 12).repeat(2000, 1)
    quantizer = build(update="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            quantizer(x[:5])
        assert quantizer.usage() > 0, "495 rows are too few to judge 40 codes by"
    with pytest.warns(RuntimeWarning, match="VectorQuantizer: the codebook collapses: 2495 rows .* hit 1 of 40"):
        quantizer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer.usage()
        healthy, off = build(update="none"), build(update="none")
        healthy(normal(2000, 12)), healthy.usage()
        off.codebook.collapse_threshold = 0
        off(x), off.usage()
    with pytest.warns(RuntimeWarning, match="collapses"):
        asked = build(update="none")
        asked(x)
        asked.usage()


class Dispatched(TorchDispatchMode):
    """Sends every call through the dispatcher, where tensors without memory meet the operators' shapes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", [*KINDS, "scales"])
def test_a_step_off_the_cpu_reads_no_value(monkeypatch, kind, update, masked):
    """Tensors without memory have none to read: a step that waits for its device, or lets values decide a shape, fails on them."""
    monkeypatch.setattr(_native, "_missing", lambda *_: None)
    options = {"update": update, "dead_code_threshold": 0.5, "kmeans_init": True}
    with torch.device("meta"):
        module = scales(**options) if kind == "scales" else build(kind, **options)
        x = torch.randn((6, 12, 4, 4) if kind == "scales" else (64, 12), requires_grad=True)
        mask = torch.ones(len(x), dtype=torch.bool) if masked else None
    codebook = (module.quantizer if kind == "scales" else module).codebook
    with Dispatched():
        with pytest.raises((RuntimeError, NotImplementedError)):
            module(x, mask)  # k-means asks whether it is needed
        codebook._placed = True
        module(x, mask).loss.backward()
    assert x.grad.shape == x.shape


# Bad batches


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", [*KINDS, "scales"])
def test_a_bad_batch_poisons_nothing(kind, update, bad):
    """As the first batch, between good ones, whole or in part: codebooks, averages and an optimiser's step stay finite."""
    options = {"update": update, "kmeans_init": True, "dead_code_threshold": 0.5, "decay": 0.5}
    module = scales(**options) if kind == "scales" else build(kind, **options)
    quantizer = module.quantizer if kind == "scales" else module
    shape = (6, 12, 4, 4) if kind == "scales" else (96, 12)
    optimiser = torch.optim.AdamW([*module.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.warns(RuntimeWarning) as told:
        for step in range(8):
            x = normal(*shape, seed=step)
            if step in (0, 4):
                x[:] = bad
            if step == 2:
                x[: len(x) // 2] = bad
            (x,) = leaves(x)
            optimiser.zero_grad()
            module(x).loss.backward()
            optimiser.step()
            assert not x.grad.isnan().any()
    assert len([w for w in told if "NaN or inf" in str(w.message)]) == 1, "said once"
    rows = 6 * 21 if kind == "scales" else 96 * quantizer.codebook.groups
    assert module.non_finite_rows() == 2.5 * rows
    for name, value in state(quantizer).items():
        assert value.isfinite().all(), name
    module.reset_usage()
    assert module.non_finite_rows() == 0


def test_sums_beyond_float_leave_the_average_alone():
    quantizer = build(update="ema", metric="l2")
    quantizer(torch.full((8, 12), 2e38))
    quantizer(normal(50, 12))
    for name, value in state(quantizer).items():
        assert value.isfinite().all(), name
