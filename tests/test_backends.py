"""Which core runs: CUDA's calling convention and value rules, with the CPU core standing in for one that is emulated."""

import warnings

import pytest
import torch
from harness import normal
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from tokenflow_ext import _C, ops
from tokenflow_ext.ops import _native
from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer


class Emulated:
    """A core with CUDA's convention, op(args..., device, stream, counts): the CPU's, whose counts go where CUDA's go."""

    def __init__(self, *missing: str):
        self.called, self.missing = [], missing

    def __getattr__(self, op):
        if op in self.missing or not hasattr(_C, op):
            raise AttributeError(op)

        def call(*arguments):
            *arguments, device, stream, counts = arguments
            assert (device, stream) == (-1, 0)
            self.called.append(op)
            counted = getattr(_C, op)(*arguments, 1)
            if counts is not None:
                counts += torch.tensor(counted)
            return 0, 0

        return call


@pytest.fixture
def nothing_registered(monkeypatch):
    """As in a process whose other tests have not registered the emulated kernels."""
    backends = [b for b in _native.BACKENDS if b != "emulated"]
    for name, value in (("_emulator", None), ("_counts", {}), ("BACKENDS", backends)):
        monkeypatch.setattr(_native, name, value)
    monkeypatch.setattr("tokenflow_ext.ops._check.BACKENDS", backends)


@pytest.fixture
def core(nothing_registered):
    core = Emulated()
    _native.register_core("emulated", core)
    yield core
    _native._asked.emulated = False


def _calls(backend: str) -> dict:
    """Every function with a backward where it has one, and the kernels that it has to run."""
    x, codebook, ids = normal(9, 6, seed=1), normal(12, 6, seed=2), torch.arange(9)
    x.requires_grad_(), codebook.requires_grad_()
    features, tables = normal(2, 6, 4, 4, seed=3).requires_grad_(), (codebook,)
    options = {"scales": (1, 2, 4), "backend": backend}
    prefix, counts, sums = torch.arange(10).reshape(2, 5), torch.ones(12), normal(12, 6, seed=4)
    phi = normal(1, 6, 6, 3, 3, seed=5).requires_grad_(), normal(1, 6, seed=6).requires_grad_(), 0.5, [0, 0, 0]

    def both(out):
        out = [out] if isinstance(out, torch.Tensor) else [o for o in out if o.is_floating_point()]
        leaves = [t for t in (x, codebook, features, *phi[:2])]
        sum(o.square().sum() for o in out).backward(inputs=leaves)
        return [*out, *(t.grad for t in leaves)]

    def moved():
        state = codebook.detach().clone(), counts.clone(), sums.clone()
        ops.ema_update_(*state, counts, sums, decay=0.9, backend=backend)
        return state

    both_of = lambda name: [name, f"{name}_backward"]  # noqa: E731
    multi, metric = both_of("multiscale_quantize"), {"metric": "cosine", "backend": backend}
    return {
        "nearest_code": (lambda: [ops.nearest_code(x, codebook, backend=backend)], ["nearest_code"]),
        "shared_nearest_code": (lambda: [ops.shared_nearest_code([x], [codebook], **metric)], ["nearest_code"]),
        "lookup": (lambda: both(ops.lookup(ids, codebook, backend=backend)), both_of("lookup")),
        "shared_lookup": (lambda: both(ops.shared_lookup(ids, [codebook], backend=backend)), both_of("lookup")),
        "normalize_rows": (lambda: both(ops.normalize_rows(x, backend=backend)), both_of("normalize_rows")),
        "quantize": (lambda: both(ops.quantize(x, codebook, backend=backend)), both_of("quantize")),
        "shared_quantize": (lambda: both(ops.shared_quantize([x], [codebook], **metric)[2]), both_of("quantize")),
        "code_statistics": (lambda: ops.code_statistics(x, ids, 12, backend=backend), ["code_statistics"]),
        "ema_update_": (moved, ["ema_update"]),
        "entropy_loss": (
            lambda: both(ops.entropy_loss(x, codebook, temperature=0.5, **metric)),
            [*both_of("entropy_loss"), *both_of("normalize_rows"), "nearest_code"],
        ),
        "soft_quantize": (
            lambda: both(ops.soft_quantize(x, codebook, codebook, backend=backend)[0]),
            ["nearest_code", *both_of("lookup"), "soft_quantize_backward"],
        ),
        "multiscale_quantize": (lambda: both(ops.multiscale_quantize(features, tables, **options)), multi),
        "multiscale_quantize with phi": (
            lambda: both(ops.multiscale_quantize(features, tables, **options, phi=phi, loss_on="accumulated")),
            multi,
        ),
        "multiscale_rows": (
            lambda: both(ops.multiscale_rows(features, prefix, tables, scales=(1, 2), backend=backend)),
            both_of("multiscale_rows"),
        ),
        "multiscale_decode": (
            lambda: both(ops.multiscale_decode(prefix, tables, size=4, **options)),
            both_of("multiscale_decode"),
        ),
        "multiscale_inputs": (
            lambda: both(ops.multiscale_inputs(prefix, tables, size=4, rule="chain", **options)),
            both_of("multiscale_chain"),
        ),
    }


@pytest.mark.parametrize("name", _calls("native"))
def test_forward_and_backward_run_on_the_core_that_was_asked_for(core, name):
    call, kernels = _calls("emulated")[name]
    results = call()
    assert set(core.called) == set(kernels)
    before = list(core.called)
    expected = _calls("native")[name][0]()
    assert core.called == before, "the emulated core runs only where it is asked for"
    for a, b in zip(results, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_backward_follows_its_forward_whatever_was_asked_for_since(core):
    codebook = normal(12, 6, seed=2).requires_grad_()
    emulated, native = (ops.lookup(torch.arange(9), codebook, backend=b) for b in ("emulated", "native"))
    emulated.sum().backward()
    native.sum().backward()
    assert core.called == ["lookup", "lookup_backward"]
    ops.lookup(torch.arange(9), codebook)
    assert core.called == ["lookup", "lookup_backward"]


@pytest.mark.parametrize(
    "module",
    [
        lambda: VectorQuantizer(6, 12, backend="emulated", update="ema", dead_code_threshold=1),
        lambda: VectorQuantizer(6, 12, groups=2, backend="emulated", entropy_weight=0.1),
        lambda: SharedIndexQuantizer((4, 2), 12, backend="emulated", kmeans_init=True),
        lambda: MultiScaleQuantizer(SharedIndexQuantizer((4, 2), 12, channel_dim=1, backend="emulated"), (1, 2)),
    ],
)
def test_modules_run_on_the_core_that_was_asked_for(core, monkeypatch, module):
    class Unused:
        def __getattr__(self, op):
            raise AssertionError(f"{op} of the CPU core")

    module = module()
    x = normal(2, 6, 2, 2, seed=1) if isinstance(module, MultiScaleQuantizer) else normal(9, 6, seed=1)
    monkeypatch.setattr(_native, "_C", Unused())
    out = module(x.requires_grad_())
    (out.quantized.sum() + out.loss).backward()
    module.decode(module.encode(x))
    assert core.called and module.usage() > 0


@pytest.mark.parametrize(
    "module",
    [
        lambda **o: VectorQuantizer(6, 12, update="ema", **o),
        lambda **o: VectorQuantizer(6, 12, groups=2, **o),
        lambda **o: MultiScaleQuantizer(SharedIndexQuantizer((4, 2), 12, channel_dim=1, **o), (1, 2)),
    ],
)
def test_a_training_step_waits_for_no_value(module):
    """Revival of dead codes and the entropy term included: on CUDA each value that Python asks for waits for the device."""
    with FakeTensorMode():  # tensors without values: whoever asks for one fails
        made = module(dead_code_threshold=1, entropy_weight=0.1, backend="native")
        x = torch.randn(2, 6, 2, 2) if isinstance(made, MultiScaleQuantizer) else torch.randn(9, 6)
        out = made(x.requires_grad_())
        (out.quantized.sum() + out.loss).backward()
        assert x.grad.shape == x.shape
        with pytest.raises(
            (DataDependentOutputException, DynamicOutputShapeException)
        ):  # k-means is not so, in the batch that it is asked for
            module(kmeans_init=True, backend="native")(x)


def test_values_are_counted_and_usage_tells(core):
    """Nothing raises or warns at the call: CUDA would have to wait for the device."""
    x, codebook = normal(9, 6, seed=1), normal(12, 6, seed=2)
    x[2, 3], x[5, 0] = float("nan"), float("inf")
    quantizer = VectorQuantizer(6, 12, backend="emulated", update="ema", entropy_weight=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = ops.lookup(torch.tensor([3, 12, -1]), codebook, backend="emulated")
        quantizer(x)
    assert rows.isnan().all(1).tolist() == [False, True, True]
    with pytest.warns(RuntimeWarning) as caught:
        quantizer.usage()
    said = sorted(str(w.message) for w in caught)
    assert said[0].startswith("VectorQuantizer: 2 rows hold NaN or inf"), said
    assert said[1].startswith("tokenflow_ext: 2 ids lay outside"), said
    assert said[2].startswith("tokenflow_ext: 4 rows hold NaN or inf"), "of quantize and of entropy_loss, once each"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer.usage()


def test_counts_stay_where_they_are(core):
    at = _native.counts(-1).data_ptr()
    ops.nearest_code(normal(3, 6), normal(4, 6), backend="emulated")
    _native.tell_counts(torch.device("cpu"))
    assert _native.counts(-1).data_ptr() == at


def test_what_the_core_lacks_is_said(core):
    core.missing = ("lookup_backward",)
    with pytest.raises(RuntimeError, match="lookup: backend: wanted emulated, but lookup_backward was not built"):
        ops.lookup(torch.zeros(1, dtype=torch.int64), normal(4, 6), backend="emulated")
    with pytest.raises(RuntimeError, match="nearest_code: backend: wanted emulated, but no kernel .* float64"):
        ops.nearest_code(normal(3, 6).double(), normal(4, 6), backend="emulated")


def test_without_a_registered_core_emulated_is_no_backend(nothing_registered):
    sentence = "backend: wanted one of auto, native, reference, got 'emulated'"
    with pytest.raises(ValueError, match=sentence):
        ops.normalize_rows(normal(3, 6), backend="emulated")
    with pytest.raises(ValueError, match=sentence):
        VectorQuantizer(6, 12, backend="emulated")


def test_every_operator_has_a_kernel_for_both_devices():
    names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("tokenflow_ext::")]
    assert len(names) > 18
    for name in names:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tokenflow_ext::{name}", key), (name, key)
