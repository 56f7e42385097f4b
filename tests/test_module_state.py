"""What the modules remember: copies, files, resuming, moves between types and devices. Nothing loses a bit of the codebooks."""

import copy
import io
import pickle

import pytest
import torch
from harness import same_bits
from module_cases import KINDS, UPDATES, build, codebook, features, state, step
from torch import nn
from torch.nn.utils import parametrize

from tokenflow_ext.quantize import VectorQuantizer


def assert_same_state(a, b, but=()):
    left, right = state(a), state(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert name in but or same_bits(tensor, right[name]), name


def through_a_file(thing, weights_only=True):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def trained(kind, update, steps=2):
    """A module after a few batches, of its optimiser none."""
    quantizer = build(kind, update)
    for n in range(steps):
        step(quantizer, features(kind, seed=n))
    return quantizer


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: through_a_file(m, weights_only=False),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("update", ["gradient", "ema, revived"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_like_the_original(kind, update, way):
    original = trained(kind, update)
    copied = COPIES[way](original)
    assert_same_state(original, copied)
    assert copied.extra_repr() == original.extra_repr() and repr(copied) == repr(original)
    addresses = {t.data_ptr() for t in (*original.parameters(), *original.buffers())}
    assert not addresses & {t.data_ptr() for t in (*copied.parameters(), *copied.buffers())}
    original.zero_grad(), copied.zero_grad()
    for n in (10, 11):
        torch.manual_seed(n)
        expected = step(original, features(kind, seed=n))
        torch.manual_seed(n)
        assert all(same_bits(a, b) for a, b in zip(step(copied, features(kind, seed=n)), expected, strict=True))
    assert_same_state(original, copied)


class Model(nn.Module):
    """An encoder before a quantizer."""

    def __init__(self, kind, update):
        super().__init__()
        self.quantizer = build(kind, update)
        shape = (12, 12, 1) if "multi" in kind else (12, 12)
        self.encoder = nn.Conv2d(*shape) if "multi" in kind else nn.Linear(*shape)

    def forward(self, x):
        return self.quantizer(self.encoder(x))


class Training:
    """A model, its optimiser and schedule; a batch's random numbers come from its own seed, as in a resumed run."""

    def __init__(self, kind, update):
        self.kind, self.model = kind, Model(kind, update)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, 20)

    def parts(self):
        return {"model": self.model, "optimiser": self.optimiser, "schedule": self.schedule}

    def run(self, steps):
        for n in steps:
            torch.manual_seed(n)
            self.optimiser.zero_grad()
            out = self.model(features(self.kind, seed=n))
            (out.quantized.square().mean() + out.loss).backward()
            self.optimiser.step()
            self.schedule.step()

    def save(self):
        return through_a_file({name: part.state_dict() for name, part in self.parts().items()})

    def load(self, saved):
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_is_uninterrupted_training(kind, update):
    """Parameters, moving averages and both moments of AdamW, bit for bit; hits alone start anew in every run."""
    uninterrupted, first, second = (Training(kind, update) for _ in range(3))
    start = state(uninterrupted.model)
    uninterrupted.run(range(8))
    first.run(range(4))
    second.run(range(1))  # what a state dict leaves out would show
    second.load(first.save())
    second.run(range(4, 8))
    assert_same_state(uninterrupted.model, second.model, but={"hits"})
    moved = {name for name, tensor in state(second.model).items() if not torch.equal(tensor, start[name])}
    assert any("table_0" in name for name in moved) == (update != "none") and "encoder.weight" in moved
    for a, b in zip(*(t.optimiser.state_dict()["state"].values() for t in (uninterrupted, second)), strict=True):
        assert all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_strict(kind):
    """Missing, surplus and misshapen entries are refused by name."""
    for update in UPDATES:
        saved = build(kind, update).state_dict()
        table = next(name for name in saved if "table_0" in name)
        cases = {
            "Missing": {name: t for name, t in saved.items() if name != table},
            "Unexpected": {**saved, "more": saved[table]},
            "size mismatch": {**saved, table: saved[table][..., :5, :]},
        }
        for sentence, entries in cases.items():
            with pytest.raises(RuntimeError, match=f"{sentence}.*"):
                build(kind, update).load_state_dict(entries)


@pytest.mark.parametrize("kind", KINDS)
def test_codebooks_learned_by_one_rule_serve_another(kind):
    """What update="none" remembers is in every state dict: the codes that inference needs."""
    for update in ("gradient", "ema", "revived"):
        learned, still = trained(kind, update), build(kind, "none")
        missing, _ = still.load_state_dict(learned.state_dict(), strict=False)
        assert not missing
        x = features(kind, seed=9)
        assert torch.equal(still.encode(x), learned.encode(x))


def test_loading_goes_into_the_tensors_that_are_there():
    """Optimisers and views keep hold of the codebook; assign=True takes the tensors of the file instead."""
    saved, quantizer = trained("vector", "gradient").state_dict(), build("vector")
    (table,) = quantizer.codebooks()
    quantizer.load_state_dict(saved)
    assert quantizer.codebooks()[0] is table and same_bits(table, saved["codebook.table_0"])
    quantizer.load_state_dict(saved, assign=True)
    (assigned,) = quantizer.codebooks()
    assert isinstance(assigned, nn.Parameter) and assigned.data_ptr() == saved["codebook.table_0"].data_ptr()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_in_half_precision_is_read_in_full(kind, update, assign):
    """Codes that were saved in float16 lie on its grid, but they go on in float32."""
    quantizer, saved = build(kind, update), trained(kind, update).state_dict()
    half = {name: t.half() if t.is_floating_point() else t for name, t in saved.items()}
    quantizer.load_state_dict(half, assign=assign)
    for name, tensor in quantizer.state_dict().items():
        assert tensor.dtype == saved[name].dtype and torch.equal(tensor, half[name].to(tensor.dtype)), name
    step(quantizer, features(kind))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_types_of_the_model_around_it(kind, update):
    """half(), bfloat16() and back lose no bit of tables, averages and hits, gradients included; double() and back neither."""
    quantizer = trained(kind, update)
    before, grads = state(quantizer), [p.grad.clone() for p in quantizer.parameters() if p.grad is not None]
    counted = codebook(quantizer).hits.clone()
    assert counted.sum() > 0
    identity = {id(p) for p in quantizer.parameters()}
    for there in ("half", "bfloat16", "double"):
        getattr(quantizer, there)()
        dtypes = {t.dtype for t in (*quantizer.parameters(), *quantizer.buffers()) if t.is_floating_point()}
        assert dtypes == {torch.float64 if there == "double" else torch.float32}
        quantizer.float()
        for name, tensor in state(quantizer).items():
            assert same_bits(tensor, before[name]), f"{there}: {name}"
        after = [p.grad for p in quantizer.parameters() if p.grad is not None]
        assert all(same_bits(a, b) for a, b in zip(after, grads, strict=True)), there
    assert {id(p) for p in quantizer.parameters()} == identity, "an optimiser holds these"
    assert same_bits(codebook(quantizer).hits, counted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_half_model_trains_its_codebook_in_float32(kind, update, dtype):
    """Three steps on half features move the state as three float32 steps on the same numbers."""
    full, half = build(kind, update), build(kind, update).to(dtype)
    for n in range(3):
        x = features(kind, seed=n, dtype=dtype)
        torch.manual_seed(n)
        expected = full(x.float())
        torch.manual_seed(n)
        out = half(x)
        assert torch.equal(out.indices, expected.indices) and same_bits(out.loss, expected.loss)
        assert out.quantized.dtype == dtype and same_bits(out.quantized, expected.quantized.to(dtype))
        assert torch.equal(half.encode(x), out.indices) == torch.equal(full.encode(x.float()), expected.indices)
        assert half.decode(out.indices).dtype == torch.float32
    assert_same_state(full, half)


@pytest.mark.filterwarnings("ignore:tokenflow_ext. no kernel was built for meta")
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_built_on_no_device_and_filled_later(kind, update):
    """to("meta") or built there, to_empty, load_state_dict; or load_state_dict(assign=True) into the shapes."""
    source = trained(kind, update)
    with torch.device("meta"):
        born = build(kind, update)
    moved = build(kind, update).to("meta")
    for shapes in (born, moved):
        assert all(t.is_meta for t in (*shapes.parameters(), *shapes.buffers()))
        assert [t.shape for t in shapes.codebooks()] == [t.shape for t in source.codebooks()]
        filled, assigned = copy.deepcopy(shapes).to_empty(device="cpu"), copy.deepcopy(shapes)
        filled.load_state_dict(source.state_dict())
        assigned.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
        for quantizer in (filled, assigned):
            saved = {name for name in source.state_dict()}
            for name, tensor in state(quantizer).items():
                assert name not in saved or same_bits(tensor, state(source)[name]), name
            x = features(kind, seed=7)
            assert torch.equal(quantizer.eval().encode(x), source.encode(x))


@pytest.mark.parametrize("kind", KINDS)
def test_called_with_other_tensors(kind):
    """torch.func.functional_call: the tables given are read, and gradients reach them."""
    quantizer, other, x = build(kind), trained(kind, "gradient"), features(kind, seed=3)
    with torch.no_grad():
        for table in other.codebooks():
            table.add_(0.1 * torch.randn_like(table))
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(quantizer, given, (x,))
    assert torch.equal(out.indices, other.encode(x)) and not torch.equal(out.indices, quantizer.encode(x))
    out.loss.backward()
    assert all(t.grad is not None for t in given.values()) and not any(
        p.grad is not None for p in quantizer.parameters()
    )


def test_functional_call_leaves_buffers_that_it_was_given_changed():
    """An EMA step writes to the buffers of the call, not to the module's."""
    quantizer, x = build("vector", "ema"), features("vector")
    given, before = {name: b.clone() for name, b in quantizer.named_buffers()}, state(quantizer)
    torch.func.functional_call(quantizer, given, (x,))
    assert all(torch.equal(t, before[name]) for name, t in state(quantizer).items() if name != "hits")
    quantizer(x)
    assert all(torch.equal(t, given[name]) for name, t in quantizer.named_buffers() if not name.endswith("hits"))


def test_a_parametrized_table():
    """The table is what the parametrization makes of its own parameter, in every way to the codes."""

    class Halved(nn.Module):
        def forward(self, table):
            return table / 2

    quantizer, plain, x = build("vector", metric="l2"), build("vector", metric="l2"), features("vector")
    parametrize.register_parametrization(quantizer.codebook, "table_0", Halved())
    with torch.no_grad():
        plain.codebook.table_0.div_(2)
    out, expected = quantizer(x), plain(x)
    assert torch.equal(out.indices, expected.indices) and same_bits(quantizer.decode(out.indices), expected.quantized)
    (expected.loss * 0.5).backward()
    out.loss.backward()
    assert same_bits(quantizer.codebook.parametrizations.table_0.original.grad, plain.codebook.table_0.grad)
    quantizer.half()
    assert torch.equal(quantizer(x.half()).indices, plain(x.half()).indices)


def test_shared_between_modules():
    """One quantizer twice in a model is one state, in its state dict and after a copy."""
    quantizer = VectorQuantizer(12, 40, update="ema")
    both = nn.ModuleList([quantizer, quantizer])
    copied = copy.deepcopy(both)
    assert copied[0] is copied[1] and len(list(copied.buffers())) == len(list(quantizer.buffers()))
    copied[0](features("vector"))
    assert int(copied[1].codebook.hits.sum()) == 32 and int(quantizer.codebook.hits.sum()) == 0
