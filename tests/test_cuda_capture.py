"""What may not happen while a CUDA graph is captured: no op or module waits for the device or asks for a number.

Steps run twice: on the emulated kernels, where every call that would wait raises, by the short way and through the
dispatcher; and on fake tensors of a GPU, where nothing has numbers and whatever leaves the device is seen.
"""

import contextlib

import emulator
import pytest
import torch
from harness import normal
from multiscale_cases import MODES, case, decoding
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenflow_ext import ops
from tokenflow_ext.ops import _native
from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer

METHODS = (
    "item tolist cpu numpy nonzero unique masked_select __bool__ __int__ __float__ __index__ __array__ equal".split()
)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal", "bincount")
"""Operators of aten whose result is a number, or has a shape, that only the device knows."""


class Forbidden(AssertionError):
    """Something that a capture does not survive."""


class _Watching(TorchDispatchMode):
    """Raises where an operator waits, or takes a tensor to another device than that of its arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._opname
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name in WAITS or (name == "repeat_interleave" and "Tensor" in function._overloadname):
            raise Forbidden(str(function))
        if name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in given[1:]):
            raise Forbidden(f"{function} by a mask")
        results = function(*args, **(kwargs or {}))
        devices = {t.device for t in given if t.dim() > 0}
        for t in tree_leaves(results):
            if isinstance(t, torch.Tensor) and devices and t.device not in devices:
                raise Forbidden(f"{function}: from {devices} to {t.device}")
        return results


def refuse(name):
    def refused(*args, **kwargs):
        raise Forbidden(name)

    return refused


@contextlib.contextmanager
def capturing(watched: bool):
    """Inside the block everything forbidden raises; `watched`: by operators of aten too, which closes the short way."""
    with pytest.MonkeyPatch.context() as patch:
        for method in METHODS:
            patch.setattr(torch.Tensor, method, refuse(method))
        for name in ("nonzero", "unique", "masked_select", "equal", "bincount"):
            patch.setattr(torch, name, refuse(name))
        for name in ("synchronize", "current_stream", "set_device"):
            patch.setattr(torch.cuda, name, refuse(name))
        with _Watching() if watched else contextlib.nullcontext():
            yield


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0, 0]), lambda x: int(x[0, 0]), lambda x: x.cpu(),
        lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: torch.nonzero(x), lambda x: x.numpy(),
        lambda x: 1 if x[0, 0] else 0, lambda x: torch.cuda.synchronize(), lambda x: torch.equal(x, x), lambda x: range(x[0, 0].long()),
    ],
)  # fmt: skip
def test_what_waits_is_noticed(call, watched):
    with pytest.raises(Forbidden), capturing(watched):
        call(torch.ones(2, 2))


@pytest.mark.parametrize(
    "call", [lambda x: x[x > 0], lambda x: torch.where(x > 0), lambda x: x.repeat_interleave(x[0].long(), 0)]
)
def test_operators_that_wait_are_noticed(call):
    with pytest.raises(Forbidden), capturing(True):
        call(torch.ones(2, 2))


def step(call, leaves) -> None:
    """A forward and, where something learns, its backward."""
    results = call()
    floats = [r for r in ([results] if isinstance(results, torch.Tensor) else tree_leaves(results)) if r.requires_grad]
    if floats:
        upstream = [torch.ones_like(r) for r in floats]
        torch.autograd.grad(floats, leaves, upstream, allow_unused=True)


def op_steps(backend: str, device: str):
    """Every function with a CUDA kernel: name -> (call, leaves)."""
    made = {}

    def on(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) if device != "cpu" else t

    grad = device == "cpu"  # torch without CUDA has no graph of gradients on a GPU
    x, codebook, ids = on(normal(30, 8, seed=1)), on(normal(20, 8, seed=2)), on(torch.arange(30) % 23)
    narrow = on(normal(30, 3, seed=3)), on(normal(20, 3, seed=4))
    leaves = [t.requires_grad_(grad) for t in (x, codebook, *narrow)]
    how = {"backend": backend}
    state = on(normal(20, 8, seed=5)), on(torch.ones(20)), on(normal(20, 8, seed=6))
    made["nearest_code"] = lambda: ops.nearest_code(x, codebook, topk=3, return_scores=True, **how)
    made["shared_nearest_code"] = lambda: ops.shared_nearest_code([x, narrow[0]], [codebook, narrow[1]], **how)
    made["lookup"] = lambda: ops.lookup(ids, codebook, **how)
    made["normalize_rows"] = lambda: ops.normalize_rows(x, **how)
    made["quantize"] = lambda: ops.quantize(x, codebook, **how)
    made["shared_quantize"] = lambda: ops.shared_quantize([x, narrow[0]], [codebook, narrow[1]], **how)
    made["code_statistics"] = lambda: ops.code_statistics(x.detach(), ids, 20, **how)
    made["ema_update_"] = lambda: ops.ema_update_(*state, *state[1:], decay=0.9, **how)
    for name in ("entropy_loss", "soft_quantize"):
        if all(hasattr(_native._emulator, kernel) for kernel in _native.KERNELS[name]):
            made[name] = {
                "entropy_loss": lambda: ops.entropy_loss(x, codebook, metric="cosine", temperature=0.1, **how),
                "soft_quantize": lambda: ops.soft_quantize(x, codebook, codebook, **how),
            }[name]
    made = {name: (call, leaves) for name, call in made.items()}
    for mode in MODES:
        features, tables, options = case("oblong", mode)
        size = features.shape[2:]
        features, *tables = (on(t).requires_grad_(grad) for t in (features, *tables))
        wanted = [features, *tables]
        if "phi" in options:
            weight, bias, *rest = options["phi"]
            weight, bias = (on(t).requires_grad_(grad) for t in (weight, bias))
            options["phi"], wanted = (weight, bias, *rest), [*wanted, weight, bias]
        length = sum(h * w for h, w in options["scales"])
        codes = on(torch.arange(3 * length).view(3, length) % 37)
        decode = decoding(options, size)
        for name, call in (
            ("quantize", lambda f, t, c, o, d: ops.multiscale_quantize(f, t, **o, **how)),
            ("rows", lambda f, t, c, o, d: ops.multiscale_rows(f, c, t, **o, **how)),
            ("decode", lambda f, t, c, o, d: ops.multiscale_decode(c, t, **d, **how)),
            ("inputs", lambda f, t, c, o, d: ops.multiscale_inputs(c, t, rule="accumulate", **d, **how)),
            ("chain", lambda f, t, c, o, d: ops.multiscale_inputs(c, t, rule="chain", **d, **how)),
        ):
            if name == "chain" and "phi" in options:
                continue
            arguments = features, tables, codes, options, decode
            made[f"multiscale_{name}, {mode}"] = (lambda call=call, a=arguments: call(*a)), wanted
    return made


NAMES = [
    "nearest_code", "shared_nearest_code", "lookup", "normalize_rows", "quantize", "shared_quantize", "code_statistics",
    "ema_update_", "entropy_loss", "soft_quantize",
    *(f"multiscale_{n}, {m}" for m in MODES for n in ("quantize", "rows", "decode", "inputs", "chain")
      if n != "chain" or "phi" not in m),
]  # fmt: skip
HELPERS = {"multiscale": lambda q: MultiScaleQuantizer(q, (1, 2, 4)), "plain": lambda q: q}
QUANTIZERS = {
    "one table": lambda **o: VectorQuantizer(8, 20, channel_dim=1, **o),
    "groups": lambda **o: VectorQuantizer(8, 20, groups=2, channel_dim=1, **o),
    "two tables": lambda **o: SharedIndexQuantizer((5, 3), 20, channel_dim=1, **o),
    "l2": lambda **o: VectorQuantizer(8, 20, channel_dim=1, metric="l2", **o),
    "revived": lambda **o: VectorQuantizer(8, 20, channel_dim=1, dead_code_threshold=1, **o),
}


@pytest.fixture
def core():
    emulator.configure(emulator.core())


@pytest.mark.parametrize("watched", [False, True], ids=["short way", "dispatcher"])
@pytest.mark.parametrize("name", NAMES)
def test_ops_do_not_wait(core, name, watched):
    made = op_steps("emulated", "cpu")
    if name not in made:
        pytest.skip("it has no kernel for CUDA")
    with capturing(watched):
        step(*made[name])


def quantizer(kind: str, update: str, around: str, backend: str):
    if around == "multiscale" and kind == "groups":
        pytest.skip("groups have no scales")
    return HELPERS[around](QUANTIZERS[kind](update=update, backend=backend)).train()


@pytest.mark.parametrize("watched", [False, True], ids=["short way", "dispatcher"])
@pytest.mark.parametrize("around", HELPERS)
@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_training_steps_do_not_wait(core, kind, update, around, watched):
    module, features = quantizer(kind, update, around, "emulated"), normal(2, 8, 4, 4, seed=1).requires_grad_()
    leaves = [features, *module.parameters()]
    with capturing(watched):
        for _ in range(2):
            step(lambda: module(features), leaves)
        module.eval()
        with torch.no_grad():
            module(features)
            if around == "multiscale":
                module.encode(features)


class _Cuda:
    """Stands in for the core of CUDA, which fake tensors never reach."""

    def __init__(self, own):
        self._own, self.cuda = own, emulator.core()

    def __getattr__(self, name):
        return getattr(self._own, name)


@pytest.fixture
def with_cuda(core, monkeypatch):
    monkeypatch.setattr(_native, "_C", _Cuda(_native._C))


@pytest.mark.parametrize("name", NAMES)
def test_ops_stay_on_a_gpu(with_cuda, name):
    with FakeTensorMode(), torch.no_grad():
        made = op_steps("native", "cuda:1")
        if name not in made:
            pytest.skip("it has no kernel for CUDA")
        with _Watching():
            results = tree_leaves(made[name][0]())
    assert all(r.device == torch.device("cuda:1") for r in results if isinstance(r, torch.Tensor))


@pytest.mark.parametrize("around", HELPERS)
@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_modules_stay_on_a_gpu(with_cuda, kind, update, around):
    """In training without gradients, and in eval: every aten operator between the ops of ours, too."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda:1"):
            module, features = quantizer(kind, update, around, "native").requires_grad_(False), torch.empty(2, 8, 4, 4)
        with _Watching():
            for module in (module, module.eval()):
                out = module(features)
    assert {t.device for t in out} == {torch.device("cuda:1")} and out.quantized.shape == (2, 8, 4, 4)


@pytest.mark.parametrize(
    ("training", "how"),
    [(True, "compile"), (True, "make_fx"), (False, "compile"), (False, "make_fx"), (False, "export")],
)  # an export in training holds the counts, which are no buffers, as constants: they cannot be fake tensors of another mode
@pytest.mark.parametrize("around", HELPERS)
@pytest.mark.parametrize(
    ("kind", "update"),
    [*((kind, "gradient") for kind in QUANTIZERS if kind != "revived"), ("one table", "ema"), ("l2", "ema")],
)  # the others index a tensor from Python, which torch without CUDA cannot do on a GPU while it traces
def test_modules_on_a_gpu_become_one_graph(with_cuda, kind, update, around, training, how):
    """As far as tracing goes without a GPU: gradients need torch's own CUDA."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda:1"):
            module, features = quantizer(kind, update, around, "native").requires_grad_(False), torch.empty(2, 8, 4, 4)
        module.train(training)
        wanted, graphs = module(features), []
        if how == "compile":
            torch._dynamo.reset()
            call = torch.compile(module, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)
            made = call(features)
        elif how == "make_fx":
            graphs.append(make_fx(lambda x: tuple(module(x)), tracing_mode="fake")(features))
            made = graphs[0](features)
        else:
            graphs.append(torch.export.export(module, (features,)).graph_module)
            made = wanted
    called = [node.target._opname for node in graphs[0].graph.nodes if "tokenflow_ext" in str(node.target)]
    assert len(graphs) == 1 and called[0] == {"plain": "quantize", "multiscale": "multiscale_quantize"}[around]
    assert ("ema_update_" in called) == (update == "ema" and training)
    for a, b in zip(made, wanted, strict=True):
        assert (a.device, a.shape, a.dtype, a.stride()) == (b.device, b.shape, b.dtype, b.stride())
