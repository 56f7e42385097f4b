"""VectorQuantizer and SharedIndexQuantizer: state, updates, usage, precision, and what a training step needs."""

import copy
import io
import warnings

import pytest
import torch
from harness import METRICS, assert_gradients, assert_near, assert_sentence, compiled, leaves, normal, same_bits
from torch.utils.checkpoint import checkpoint

from tokenflow_ext import ops
from tokenflow_ext.quantize import SharedIndexQuantizer, VectorQuantizer
from tokenflow_ext.reference.entropy import entropy_loss

KINDS = {
    "vector": lambda **k: VectorQuantizer(12, 40, **k),
    "groups": lambda **k: VectorQuantizer(12, 40, groups=3, **k),
    "shared": lambda **k: SharedIndexQuantizer((8, 4), 40, weights=(1.0, 3.0), **k),
}


def build(kind="vector", **options):
    """A quantizer of 12 channels and 40 codes, the same whenever it is built."""
    torch.manual_seed(5)
    return KINDS[kind](backend="native", **options)


def state(module):
    return {name: tensor.clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def changed(module, before):
    """Names of parameters and buffers that are not what they were."""
    return {name for name, tensor in state(module).items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_op(kind, metric):
    quantizer, x = build(kind, metric=metric, commitment_weight=0.3, codebook_weight=0.7), normal(6, 7, 12, seed=1)
    out = quantizer(x)
    options = {"metric": metric, "commitment_weight": 0.3, "codebook_weight": 0.7}
    if kind == "shared":
        quantized, indices, loss = ops.shared_quantize(
            x.split((8, 4), -1), quantizer.codebooks(), weights=(1, 3), **options
        )
        quantized = torch.cat(quantized, -1)
    else:
        rows = x.unflatten(-1, (3, 4)) if kind == "groups" else x
        quantized, indices, loss = ops.quantize(rows, *quantizer.codebooks(), **options)
    assert torch.equal(out.indices, indices) and out.indices.shape == ((6, 7, 3) if kind == "groups" else (6, 7))
    assert same_bits(out.quantized, quantized.reshape(x.shape)) and same_bits(out.loss, loss)
    assert torch.equal(quantizer.encode(x), indices)
    assert same_bits(quantizer.decode(indices), out.quantized)
    quantizer.eval()
    again = quantizer(x)
    assert same_bits(again.quantized, out.quantized) and same_bits(again.loss, loss), "loss in eval too"


@pytest.mark.parametrize("kind", KINDS)
def test_channel_dim(kind):
    last, second = build(kind), build(kind, channel_dim=1)
    x = normal(2, 12, 3, 5, seed=1)
    a, b = last(x.movedim(1, -1)), second(x)
    assert torch.equal(a.indices, b.indices) and same_bits(a.quantized.movedim(-1, 1), b.quantized)
    assert same_bits(second.decode(b.indices), b.quantized) and torch.equal(second.encode(x), b.indices)
    assert b.quantized.shape == x.shape and b.indices.shape[:3] == (2, 3, 5)


def test_codebook_shapes_and_parameters():
    assert [c.shape for c in build("vector").codebooks()] == [(40, 12)]
    assert [c.shape for c in build("groups").codebooks()] == [(3, 40, 4)]
    assert [c.shape for c in build("shared").codebooks()] == [(40, 8), (40, 4)]
    for kind in KINDS:
        assert len(list(build(kind).parameters())) == len(build(kind).codebooks())
        for update in ("ema", "none"):
            assert not list(build(kind, update=update).parameters())
        for table in build(kind).codebooks():
            assert_near(table.norm(dim=-1), torch.ones(table.shape[:-1]), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_update(kind):
    quantizer, (x,) = build(kind), leaves(normal(64, 12, seed=1))
    out = quantizer(x)
    (out.quantized.square().sum() + out.loss).backward()
    assert x.grad.abs().sum() > 0
    for table in quantizer.codebooks():
        assert table.grad.abs().sum() > 0
    codebook_alone = torch.autograd.grad(quantizer(x).quantized.sum(), quantizer.codebooks(), materialize_grads=True)
    assert not any(g.any() for g in codebook_alone)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_ema_update_is_the_formula(kind, metric):
    """One training batch moves the tables as code_statistics and ema_update_ say, unit table by table for cosine."""
    quantizer, x = build(kind, update="ema", decay=0.7, metric=metric), normal(64, 12, seed=1)
    before = [t.clone() for t in quantizer.codebooks()]
    out = quantizer(x)
    widths = (8, 4) if kind == "shared" else (4, 4, 4) if kind == "groups" else (12,)
    for t, part in enumerate(x.split(widths, -1)):
        old, new = (
            [c[t] for c in tables[0:1]][0] if kind == "groups" else tables[t]
            for tables in (before, quantizer.codebooks())
        )
        ids = out.indices[:, t] if kind == "groups" else out.indices
        rows = ops.normalize_rows(part) if metric == "cosine" else part
        expected, counts, sums = old.clone(), torch.ones(40), old.clone()
        ops.ema_update_(expected, counts, sums, *ops.code_statistics(rows, ids, 40), decay=0.7, metric=metric)
        assert_near(new, expected, 2e-6)
        assert same_bits(new[ids.bincount(minlength=40) == 0], old[ids.bincount(minlength=40) == 0])
    assert_near(
        quantizer.codebook.ema_counts.sum(-1), 0.7 * 40 + 0.3 * torch.full((quantizer.codebook.groups,), 64.0), 1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ema_has_no_codebook_loss(kind):
    x = normal(64, 12, seed=1)
    ema, plain = build(kind, update="ema", codebook_weight=5.0), build(kind, codebook_weight=0.0)
    assert same_bits(ema(x).loss, plain(x).loss)


@pytest.mark.parametrize("update", ["gradient", "ema", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_eval_changes_no_state(kind, update):
    quantizer = build(kind, update=update, dead_code_threshold=2, kmeans_init=True, entropy_weight=0.1).eval()
    before, x = state(quantizer), normal(64, 12, seed=1)
    quantizer(x)
    quantizer.encode(x)
    quantizer.decode(quantizer.encode(x))
    assert not changed(quantizer, before) and quantizer.usage() == 0


def test_encode_in_training_changes_no_state():
    quantizer = build(update="ema")
    before = state(quantizer)
    quantizer.encode(normal(9, 12))
    assert not changed(quantizer, before)


def test_update_none_moves_nothing_but_the_count():
    quantizer = build(update="none")
    before, (x,) = state(quantizer), leaves(normal(64, 12, seed=1))
    quantizer(x).loss.backward()
    assert x.grad.any() and not changed(quantizer, before)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_freeze(update):
    quantizer = build(update=update, dead_code_threshold=5)
    quantizer(normal(64, 12, seed=1))
    quantizer.freeze()
    before, (x,) = state(quantizer), leaves(normal(64, 12, seed=2))
    quantizer(x).loss.backward()
    assert not changed(quantizer, before)
    assert x.grad.any() and not any(t.requires_grad for t in quantizer.codebooks())
    still = build(update="none")
    still.load_state_dict(
        {name: tensor for name, tensor in quantizer.state_dict().items() if name in still.state_dict()}
    )
    assert same_bits(quantizer(x).loss, still(x).loss), "the commitment loss alone stays"


@pytest.mark.parametrize("kind", KINDS)
def test_usage_and_perplexity(kind):
    quantizer, x = build(kind), normal(50, 12, seed=1)
    assert quantizer.usage() == 0 and quantizer.perplexity() == 0
    ids = quantizer(x).indices.reshape(50, -1)
    ids = torch.cat([ids, quantizer(x[:20] * -1).indices.reshape(20, -1)])
    assert quantizer.usage() == pytest.approx(sum(len(i.unique()) for i in ids.T) / (40 * ids.shape[1]))
    shares = [i.bincount().double() / 70 for i in ids.T]
    expected = sum(torch.exp(-(s * s.clamp_min(1e-300).log()).sum()).item() for s in shares) / len(shares)
    assert quantizer.perplexity() == pytest.approx(expected)
    quantizer.reset_usage()
    assert quantizer.usage() == 0 and quantizer.perplexity() == 0


def test_rows_that_are_not_finite_enter_no_state():
    x = normal(30, 12, seed=1)
    x[7, 3] = float("nan")
    spoiled, clean = build(update="ema"), build(update="ema")
    with pytest.warns(RuntimeWarning):
        out = spoiled(x)
    clean(x[[i for i in range(30) if i != 7]])
    assert out.quantized[7].isnan().all() and out.indices[7] == 0
    for name, tensor in state(clean).items():
        assert torch.equal(tensor, state(spoiled)[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_counts_once(kind):
    plain, checkpointed = build(kind, update="ema"), build(kind, update="ema")
    (a,), (b,) = leaves(normal(64, 12, seed=1)), leaves(normal(64, 12, seed=1))
    out = plain(a)
    (out.quantized.square().sum() + out.loss).backward()

    def step(x):
        out = checkpointed(x)
        return out.quantized.square().sum() + out.loss

    checkpoint(step, b, use_reentrant=False).backward()
    for name, tensor in state(plain).items():
        assert torch.equal(tensor, state(checkpointed)[name]), name
    assert checkpointed.codebook.hits.sum() == 64 * checkpointed.codebook.groups


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"update": "ema"}, {"update": "gradient", "dead_code_threshold": 3}], ids=["ema", "revival"]
)
def test_backward_after_the_codebook_moved(kind, metric, options):
    """EMA and revival move the codebook inside forward; the gradients, entropy's included, are those of the codes searched."""
    moving, (x,) = (
        build(kind, metric=metric, entropy_weight=0.1, entropy_temperature=1.0, **options),
        leaves(normal(64, 12, seed=1)),
    )
    still = build(kind, metric=metric, entropy_weight=0.1, entropy_temperature=1.0, update="none")
    still.codebook_weight = moving.codebook_weight
    before = state(moving)
    out = moving(x)
    assert "codebook.table_0" in changed(moving, before)
    (gradient,) = torch.autograd.grad(out.quantized.square().sum() + out.loss, x)
    (again,) = leaves(x)
    expected = still(again)
    (expected_gradient,) = torch.autograd.grad(expected.quantized.square().sum() + expected.loss, again)
    assert_near(out.loss, expected.loss, 1e-6)
    assert_near(gradient, expected_gradient, 1e-6)


def test_two_forwards_then_one_backward():
    """Tied modules: the second batch moves the codebook before the first one's backward."""
    quantizer, (x,) = build(update="ema"), leaves(normal(64, 12, seed=1))
    total = quantizer(x).loss + quantizer(x * 2).loss
    total.backward()
    assert x.grad.isfinite().all()


def test_entropy_term():
    quantizer, plain, (x,) = (
        build("shared", entropy_weight=0.2, entropy_temperature=0.5),
        build("shared"),
        leaves(normal(30, 12, seed=1)),
    )
    tables = quantizer.codebooks()
    first, second = entropy_loss(x.split((8, 4), -1), tables, metric="cosine", temperature=0.5, weights=(1.0, 3.0))
    assert first >= 0 and second >= 0
    assert_near(quantizer(x).loss, plain(x).loss + 0.2 * (first - second), 1e-6)
    quantizer.eval()
    assert_near(quantizer(x).loss, plain(x).loss, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_kmeans_init(kind):
    """The first training batch places the codes; it happens once and survives a round trip through a state dict."""
    centres = normal(40, 12, seed=9) * 3
    x = (centres[:, None] + 0.01 * normal(40, 30, 12, seed=1)).reshape(-1, 12)
    quantizer = build(kind, kmeans_init=True, update="none")
    random = build(kind, update="none")
    loss = quantizer(x).loss
    assert loss < 0.8 * random(x).loss and not bool(quantizer.codebook.needs_init)
    before = state(quantizer)
    quantizer(normal(50, 12))
    assert not changed(quantizer, before)
    copied = build(kind, kmeans_init=True, update="none")
    copied.load_state_dict(quantizer.state_dict())
    copied(normal(50, 12))
    assert all(same_bits(a, b) for a, b in zip(copied.codebooks(), quantizer.codebooks()))


def test_kmeans_waits_for_rows():
    quantizer = build(kmeans_init=True)
    quantizer(torch.empty(0, 12))
    assert bool(quantizer.codebook.needs_init)
    quantizer(normal(5, 12))
    assert not bool(quantizer.codebook.needs_init)


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("kind", KINDS)
def test_dead_codes_take_rows_of_the_batch(kind, update):
    quantizer = build(kind, update=update, dead_code_threshold=0.5, decay=0.5)
    x = normal(400, 12, seed=1)
    with torch.no_grad():
        for table in quantizer.codebooks():
            table[..., :35, :] = -10 * torch.ones_like(table[..., :35, :])
    for _ in range(6):
        quantizer(x)
    quantizer.reset_usage()
    quantizer(x)
    assert quantizer.usage() > 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_counts_what_a_recount_counts(kind, update, dtype):
    """Statistics that come out of the search leave the same bits as those taken again from rows and ids."""
    x = normal(300, 12, seed=1, dtype=dtype)
    x[7, 11] = float("nan")
    searched, recounted = build(kind, update=update), build(kind, update=update)
    with pytest.warns(RuntimeWarning, match="1 rows"):
        ids = searched(x).indices
        recounted.codebook.observe(recounted._flat(x), ids.reshape(300, -1), "native")
    expected = state(recounted)
    assert not changed(searched, expected) and int(searched.codebook.hits.sum()) in (299, 3 * 300 - 1)


def test_unused_codes_stay_without_a_threshold():
    quantizer = build(update="ema")
    before = quantizer.codebooks()[0].clone()
    ids = quantizer(normal(3, 12)).indices
    unused = [k for k in range(40) if k not in ids]
    assert same_bits(quantizer.codebooks()[0][unused], before[unused])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", ["gradient", "ema", "none"])
def test_state_dict_round_trip(kind, update):
    trained, x = build(kind, update=update, dead_code_threshold=1), normal(64, 12, seed=1)
    trained(x)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh = KINDS[kind](update=update, dead_code_threshold=1)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.eval()(x).indices, trained.eval()(x).indices)
    copied = copy.deepcopy(trained)
    assert same_bits(copied(x).quantized, trained(x).quantized)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_model_keeps_float32_tokens(kind, dtype):
    quantizer, x = build(kind), normal(300, 12, seed=1, dtype=dtype)
    expected = quantizer(x.float())
    quantizer = quantizer.to(dtype)
    assert all(t.dtype == torch.float32 for t in quantizer.codebooks())
    out = quantizer(x)
    assert torch.equal(out.indices, expected.indices) and out.quantized.dtype == dtype
    assert same_bits(out.quantized, expected.quantized.to(dtype)) and same_bits(out.loss, expected.loss)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(quantizer(x).indices, expected.indices)
    assert all(t.dtype == torch.float64 for t in build(kind).double().codebooks())


def test_backends_agree():
    x = normal(64, 12, seed=1)
    for kind in KINDS:
        native, slow = build(kind, update="ema"), build(kind, update="ema")
        slow.backend = "reference"
        a, b = native(x), slow(x)
        assert torch.equal(a.indices, b.indices)
        assert_near(a.quantized, b.quantized, 1e-6)
        assert_near(a.loss, b.loss, 1e-6)
        for name, tensor in state(native).items():
            assert_near(tensor.double(), state(slow)[name].double(), 2e-6, name)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_single_rows(kind):
    quantizer = build(kind, update="ema", dead_code_threshold=1)
    out = quantizer(torch.empty(0, 12))
    assert out.quantized.shape == (0, 12) and out.loss.item() == 0 and out.indices.shape[0] == 0
    single = quantizer(normal(12))
    assert single.quantized.shape == (12,) and single.indices.shape == ((3,) if kind == "groups" else ())


def test_one_code():
    quantizer = VectorQuantizer(4, 1, update="ema")
    out = quantizer(normal(9, 4))
    assert not out.indices.any() and quantizer.usage() == 1


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_compile(update):
    eager, traced = build("shared", update=update), build("shared", update=update)
    (a,), (b,) = leaves(normal(64, 12, seed=1)), leaves(normal(64, 12, seed=1))
    step = compiled(lambda x: traced(x)[::2])
    quantized, loss = step(b)
    out = eager(a)
    assert same_bits(quantized, out.quantized) and same_bits(loss, out.loss)
    assert_gradients(torch.autograd.grad(loss, b), torch.autograd.grad(out.loss, a), 1e-6)
    for name, tensor in state(eager).items():
        assert_near(tensor.double(), state(traced)[name].double(), 1e-6, name)


def test_training_learns():
    """Commitment and codebook loss bring codes and rows together: loss falls on fixed data."""
    x = normal(200, 12, seed=1)
    for update in ("gradient", "ema"):
        quantizer = build(update=update, decay=0.8)
        first = quantizer(x).loss.item()
        optimiser = torch.optim.Adam([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], lr=0.03)
        for _ in range(30):
            optimiser.zero_grad()
            loss = quantizer(x).loss
            if update == "gradient":
                loss.backward()
                optimiser.step()
        assert loss.item() < 0.7 * first


def test_no_warning_in_an_ordinary_step():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in KINDS:
            quantizer, (x,) = build(kind), leaves(normal(9, 12))
            quantizer(x).loss.backward()


BAD = {
    "codes": ("codebook_size", ValueError, {"codebook_size": 0}),
    "codes kind": ("codebook_size", TypeError, {"codebook_size": 2.5}),
    "metric": ("metric", ValueError, {"metric": "x"}),
    "update": ("update", ValueError, {"update": "sgd"}),
    "commitment": ("commitment_weight", ValueError, {"commitment_weight": -1.0}),
    "codebook weight": ("codebook_weight", ValueError, {"codebook_weight": float("nan")}),
    "entropy": ("entropy_weight", ValueError, {"entropy_weight": -1.0}),
    "temperature": ("entropy_temperature", ValueError, {"entropy_temperature": 0.0}),
    "entropy eps": ("entropy_eps", ValueError, {"entropy_eps": -1.0}),
    "decay": ("decay", ValueError, {"decay": 2.0}),
    "dead": ("dead_code_threshold", ValueError, {"dead_code_threshold": -1}),
    "channel": ("channel_dim", TypeError, {"channel_dim": "last"}),
    "backend": ("backend", ValueError, {"backend": "x"}),
}


@pytest.mark.parametrize("kind", [VectorQuantizer, SharedIndexQuantizer])
@pytest.mark.parametrize("case", BAD)
def test_bad_options(case, kind):
    argument, error, change = BAD[case]
    options = {"codebook_size": 40, **change}
    assert_sentence(
        error,
        kind.__name__,
        argument,
        kind,
        12 if kind is VectorQuantizer else (8, 4),
        options.pop("codebook_size"),
        **options,
    )


def test_bad_shapes():
    assert_sentence(ValueError, "VectorQuantizer", "dim", VectorQuantizer, 0, 4)
    assert_sentence(ValueError, "VectorQuantizer", "dim", VectorQuantizer, 12, 4, groups=5)
    assert_sentence(ValueError, "SharedIndexQuantizer", "dims", SharedIndexQuantizer, (), 4)
    assert_sentence(TypeError, "SharedIndexQuantizer", "dims", SharedIndexQuantizer, 12, 4)
    assert_sentence(ValueError, "SharedIndexQuantizer", "weights", SharedIndexQuantizer, (8, 4), 4, weights=(1.0,))
    for kind, name in (("vector", "VectorQuantizer"), ("shared", "SharedIndexQuantizer")):
        for error, x in (
            (ValueError, torch.zeros(3, 11)),
            (ValueError, torch.zeros(())),
            (TypeError, torch.zeros(3, 12).long()),
            (TypeError, None),
        ):
            assert_sentence(error, name, "x", build(kind), x)
            assert_sentence(error, name, "x", build(kind).encode, x)
        assert_sentence(TypeError, "lookup", "indices", build(kind).decode, torch.zeros(3))
        assert_sentence(ValueError, "lookup", "indices", build(kind).decode, torch.full((3,), 40))
    assert_sentence(ValueError, "lookup", "indices", build("groups").decode, torch.zeros(3, 2, dtype=torch.int64))
