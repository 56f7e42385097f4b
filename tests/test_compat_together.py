"""What the compatible quantizers have in common: one graph, no N x K, the twins' numbers, one import to swap."""

import importlib

import pytest
import torch
from harness import assert_near, normal
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflow_ext.compat.tokenflow import MultiScaleVectorQuantizer, VectorQuantizer
from tokenflow_ext.compat.unitok import VectorQuantizerM
from tokenflow_ext.compat.var import VectorQuantizer2
from tokenflow_ext.compat.vq import VectorQuantize

KINDS = {
    "tokenflow": lambda k, **o: VectorQuantizer(k, 12, 0.25, 0.1, True, True, [8, 4], **o),
    "multi-scale tokenflow": lambda k, **o: MultiScaleVectorQuantizer(
        k, 12, 0.25, 0.1, True, True, [8, 4], scales=(4, 8), **o
    ),
    "unitok": lambda k, **o: VectorQuantizerM(2 * k, 12, use_entropy_loss=True, num_codebooks=2, **o),
    "var": lambda k, **o: VectorQuantizer2(k, 12, False, v_patch_nums=(2, 4, 8), share_quant_resi=2, **o),
    "vq": lambda k, **o: VectorQuantize(12, k, **o),
}


def build(kind: str, codes: int = 40, **options):
    torch.manual_seed(3)
    return KINDS[kind](codes, **{"backend": "native", **options})


def inputs(kind: str, batch: int, seed: int = 1) -> torch.Tensor:
    x = normal(batch, 12, 8, 8, seed=seed)
    return x.flatten(2).transpose(1, 2).contiguous() if kind in ("unitok", "vq") else x


def floats(out) -> list[torch.Tensor]:
    """Every float tensor of nested returns."""
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    return [t for part in out for t in floats(part)] if isinstance(out, (tuple, list)) else []


def step(call, module, x):
    """What a training step returns, and its gradients."""
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    out = floats(call(leaf))
    sum(t.square().sum() for t in out if t.requires_grad).backward()
    return [t.detach() for t in out], [leaf.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tokenflow"])  # the loop holds all of it
def test_one_graph(kind):
    """Training steps compile without a break, for any batch size, and leave the state that eager steps leave."""
    eager, module = build(kind), build(kind)
    torch._dynamo.reset()
    graph = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, seed in ((2, 1), (3, 2), (4, 3)):
        x = inputs(kind, batch, seed)
        expected, actual = step(eager, eager, x), step(graph, module, x)
        for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
            assert_near(a, b, 1e-5, size=1e-3)
    for a, b in zip(module.state_dict().values(), eager.state_dict().values(), strict=True):
        assert_near(a.double(), b.double(), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree(kind):
    """In float64, where no near-tie is in the way."""
    x = inputs(kind, 2).double()
    native, reference = (build(kind, backend=backend).double() for backend in ("native", "reference"))
    expected, actual = step(reference, reference, x), step(native, native, x)
    for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_near(a, b, 1e-7, size=1e-3)  # usage entries are float32


class Largest(TorchDispatchMode):
    """The most elements that one tensor of any operator had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("quirks", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_rows_times_codes(kind, quirks):
    codes, x = 4096, inputs(kind, 16)
    module = build(kind, codes, **({} if kind == "vq" else {"quirks": quirks}))
    with Largest() as largest:
        step(module, module, x)
    inherent = max(2 * 12 * codes, 131072 + 16 * 64 * 2, 16 * (64 + 16 + 4) * 12)  # tables, window, pooled rows
    assert largest.elements <= inherent < 16 * 64 * codes / 10, largest.elements


@pytest.mark.parametrize("assign", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_in_half_precision_is_read_in_full(kind, assign):
    """Codes, phi and counters go on in float32: a window of ids in float16 would forget all above 2048."""
    module, saved = build(kind), build(kind).state_dict()
    half = {name: t.half() if t.is_floating_point() else t for name, t in saved.items()}
    module.load_state_dict(half, assign=assign)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == saved[name].dtype and torch.equal(tensor, half[name].to(tensor.dtype)), name


@pytest.mark.parametrize("name", ("tokenflow", "unitok", "var", "vq"))
def test_the_line_to_swap_is_in_the_docstring(name):
    module = importlib.import_module(f"tokenflow_ext.compat.{name}")
    (line,) = [text.strip() for text in module.__doc__.splitlines() if "import" in text]
    exec(line, {})
