"""torch.compile and torch.export of the modules: one graph for every batch size, and eager's bits, state included."""

import io

import pytest
import torch
from harness import assert_near, compiled, same_bits
from module_cases import DIM, KINDS, SCALES, build, features, state, step
from torch._dynamo.backends.debugging import aot_eager
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from tokenflow_ext.quantize import MultiScaleQuantizer, VectorQuantizer

BATCHES = (5, 3, 8, 1)
SYMBOLIC = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


class Counting:
    """A backend that keeps the graphs it is given."""

    def __init__(self, backend=aot_eager):
        self.graphs, self.backend = [], backend

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self.backend(graph, inputs)

    def data_dependent(self) -> set:
        """Symbols for sizes and numbers that only the data know."""
        values = [n.meta.get("example_value") for g in self.graphs for n in g.graph.nodes]
        return {s for v in tree_leaves(values) if isinstance(v, SYMBOLIC) for s in free_unbacked_symbols(v)}


def assert_same_steps(eager, traced, call, kind, batches=BATCHES):
    """Results, gradients and state of both, bit for bit, whatever the size of the batch."""
    for n in batches:
        x = features(kind, n, seed=n)
        torch.manual_seed(n)
        expected = step(eager, x)
        torch.manual_seed(n)
        for i, (a, b) in enumerate(zip(step(traced, x, call=call), expected, strict=True)):
            assert same_bits(a, b), f"batch of {n}: result {i}"
        for name, tensor in state(eager).items():
            assert torch.equal(tensor, state(traced)[name]), f"batch of {n}: {name}"


@pytest.mark.parametrize(
    ("kind", "update"),
    [
        *((kind, update) for kind in KINDS for update in ("gradient", "ema")),
        *((kind, update) for kind in ("groups", "multi vector") for update in ("revived", "ema, revived")),
        ("vector", "none"), ("shared", "entropy"), ("multi vector", "entropy"),
    ],
)  # fmt: skip
def test_one_graph_serves_every_batch(kind, update):
    """Two graphs in training (the first size is taken for a constant) and two in eval; no break, no symbol of the data."""
    eager, traced, backend = build(kind, update), build(kind, update), Counting()
    call = compiled(traced, backend)
    assert_same_steps(eager, traced, call, kind)
    assert len(backend.graphs) <= 3 and not backend.data_dependent()
    training = len(backend.graphs)
    eager.eval(), traced.eval()
    assert_same_steps(eager, traced, call, kind, (7, 4))
    assert len(backend.graphs) <= training + 2


@pytest.mark.parametrize("kind", ["shared", "multi shared"])
def test_inductor(kind):
    """The default backend: the same ids and state, and values that its fused sums round otherwise."""
    eager, traced = build(kind, "ema"), build(kind, "ema")
    torch._dynamo.reset()
    call = torch.compile(traced, fullgraph=True, dynamic=True)
    for n in (5, 8):
        x = features(kind, n, seed=n)
        actual, expected = step(traced, x, call=call), step(eager, x)
        assert torch.equal(actual[1], expected[1])
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_near(a, b, 1e-6, f"batch of {n}: result {i}")
        for name, tensor in state(eager).items():
            assert_near(state(traced)[name], tensor, 1e-6, name)


class Encode(torch.nn.Module):
    """What an encoder's export calls."""

    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x):
        return self.quantizer.encode(x)


class Decode(Encode):
    """What a decoder's export calls."""

    def forward(self, indices):
        return self.quantizer.decode(indices)


def exported(module, example, **options):
    """The program for any batch, after a file."""
    batch = torch.export.Dim("batch", max=4096)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},), **options)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("kind", KINDS)
def test_exported_encode_and_decode(kind):
    quantizer = build(kind).eval()
    encode = exported(Encode(quantizer), features(kind, 3))
    decode = exported(Decode(quantizer), quantizer.encode(features(kind, 3)))
    whole = exported(quantizer, features(kind, 3))
    for n in (1, 2, 7):
        x = features(kind, n, seed=n)
        ids = encode(x)
        assert torch.equal(ids, quantizer.encode(x)) and same_bits(decode(ids), quantizer.decode(ids))
        assert all(same_bits(a, b) for a, b in zip(whole(x), quantizer(x), strict=True))


def test_exported_in_training_without_a_trace_of_state():
    """`encode` reads no mode: exported from a module in training it counts nothing."""
    quantizer = build("shared", "ema")
    before, encode = state(quantizer), exported(Encode(quantizer), features("shared", 3), strict=True)
    assert torch.equal(encode(features("shared", 2)), quantizer.encode(features("shared", 2)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(quantizer).items())


@pytest.mark.parametrize(("kind", "update"), [("groups", "ema, revived"), ("shared", "ema"), ("multi phi", "gradient")])
def test_compiled_autocast_and_half(kind, update):
    """A half model around the compiled module, under autocast too: eager's tokens."""
    eager, traced, backend = build(kind, update).bfloat16(), build(kind, update).bfloat16(), Counting()
    call = compiled(traced, backend)
    for n in (3, 5):
        x = features(kind, n, seed=n, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.manual_seed(n)
            expected = eager(x)
            torch.manual_seed(n)
            out = call(x)
        assert out.loss.dtype == torch.float32 and all(same_bits(a, b) for a, b in zip(out, expected, strict=True))


def test_a_dropped_scale_is_drawn_on_the_host():
    """scale_dropout decides in Python which loop runs: it breaks the graph in training, and only there."""

    def dropping():
        torch.manual_seed(5)
        return MultiScaleQuantizer(VectorQuantizer(DIM, 40, update="ema"), SCALES, scale_dropout=0.5)

    eager, traced, x = dropping(), dropping(), features("multi", 3)
    with pytest.raises(Exception, match="data-dependent|scale_dropout"):
        compiled(traced)(x)
    torch._dynamo.reset()
    call = torch.compile(traced, backend="aot_eager")
    torch.manual_seed(3)
    expected = [step(eager, x) for _ in range(10)]
    torch.manual_seed(3)
    actual = [step(traced, x, call=call) for _ in range(10)]
    assert {bool((ids == -1).any()) for _, ids, *_ in expected} == {True, False}
    assert all(same_bits(a, b) for x, y in zip(actual, expected) for a, b in zip(x, y, strict=True))
    assert_same_steps(eager.eval(), traced.eval(), compiled(traced), "multi", (3,))
