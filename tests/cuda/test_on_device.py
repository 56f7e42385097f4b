"""Every op where CUDA's kernels run against the same call on the CPU: emulated everywhere, on a GPU where there is one.

Indices, gathered rows and maps have the CPU's bits; sums and gradients may differ by rounding.
"""

import warnings

import pytest
import torch
from harness import assert_gradients, assert_near, leaves, normal, same_bits
from multiscale_cases import MODES, SCALES, case, decoding

from tokenflow_ext import ops, search_precision, trace
from tokenflow_ext.ops import _native
from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]


class Place:
    """Where tensors go, and the backend that then runs CUDA's kernels."""

    def __init__(self, name: str):
        self.device, self.backend = ("cuda", "native") if name == "gpu" else ("cpu", "emulated")

    def put(self, value):
        """Tensors, also in lists, tuples and dicts, moved there."""
        if isinstance(value, torch.Tensor):
            return value.detach().to(self.device).requires_grad_(value.requires_grad)
        if isinstance(value, (list, tuple)):
            return type(value)(self.put(v) for v in value)
        return {k: self.put(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=GPU)])
def place(request):
    return Place(request.param)


def both(place: Place, call, *inputs, **options):
    """call(*inputs, **options) on the CPU and there, what came from there brought back."""
    here = call(*inputs, **options, backend="native")
    there = call(*place.put(inputs), **place.put(options), backend=place.backend)

    def back(value):
        if isinstance(value, torch.Tensor):
            return value.cpu()
        return type(value)(*map(back, value)) if hasattr(value, "_fields") else tuple(map(back, value))

    return here, back(there)


def gradients(place: Place, call, inputs, upstream, **options):
    """Gradients of sum_i <upstream_i, output_i> in the inputs, on the CPU and there."""
    result = []
    for put, backend in ((lambda v: v, "native"), (place.put, place.backend)):
        given = [put(v) for v in leaves(*inputs)]
        outputs = call(*given, **put(options), backend=backend)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.is_floating_point()]
        total = sum((o * put(u)).sum() for o, u in zip(outputs, upstream, strict=True))
        result.append([g.cpu() for g in torch.autograd.grad(total, given)])
    return result


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
@pytest.mark.parametrize("shape", [(0, 1, 5, 8), (1, 1, 31, 8), (33, 2, 4097, 8), (33, 1, 130, 72), (5, 1, 40, 257)])
def test_nearest_code(place, shape, metric):
    rows, groups, codes, width = shape
    x, codebook = normal(rows, groups, width, seed=1), normal(groups, codes, width, seed=2)
    codebook[:, codes // 2] = codebook[:, 0]  # a tie
    here, there = both(place, ops.nearest_code, x, codebook, metric=metric, topk=2, return_scores=True)
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])
    here, there = both(place, ops.nearest_code, x.bfloat16(), codebook, metric=metric, window=(3, codes - 1))
    assert torch.equal(here, there)


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
@pytest.mark.parametrize("shape", [(1, 1, 31, 8), (33, 2, 4097, 8), (300, 1, 1400, 72), (5, 1, 140, 400)])
def test_nearest_code_certified(place, shape, metric):
    """On the tensor cores, some rows handed over to the float32 search."""
    rows, groups, codes, width = shape
    x, codebook = normal(rows, groups, width, seed=1), normal(groups, codes, width, seed=2)
    codebook[:, codes // 2 :] = codebook[:, : codes - codes // 2] * (1 + 2.0**-22)
    x[rows // 2 :] *= 2.0**-60
    with search_precision("certified"), trace() as searched:
        here, there = both(place, ops.nearest_code, x, codebook, metric=metric, return_scores=True)
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])
    assert searched.bf16 + searched.fallback >= rows * groups and searched.bf16 > 0


def test_shared_index(place):
    xs, tables = [normal(50, w, seed=w) for w in (32, 8)], [normal(300, w, seed=1 + w) for w in (32, 8)]
    here, there = both(
        place, lambda xs, tables, **o: ops.shared_nearest_code(xs, tables, **o), xs, tables, weights=[1.0, 3.0]
    )
    assert torch.equal(here, there)
    call = lambda *v, backend: [*(r := ops.shared_quantize(v[:2], v[2:], backend=backend)).quantized, r.loss]  # noqa: E731
    upstream = [normal(50, 32, seed=5), normal(50, 8, seed=6), torch.tensor(3.0)]
    here, there = gradients(place, lambda *v, backend: tuple(call(*v, backend=backend)), [*xs, *tables], upstream)
    assert_gradients(there, here, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "width"), [(1, 8), (3, 5), (1, 40)])
def test_lookup_and_normalize_rows(place, groups, width, dtype):
    table = normal(groups, 60, width, seed=3, dtype=dtype)
    ids = torch.randint(0, 60, (70, groups), generator=torch.Generator().manual_seed(4))
    here, there = both(place, ops.lookup, ids, table)
    assert same_bits(here, there)
    upstream = [normal(70, groups, width, seed=5, dtype=dtype)]
    call = lambda t, ids, backend: ops.lookup(ids, t, backend=backend)  # noqa: E731
    here, there = gradients(place, call, [table], upstream, ids=ids)
    assert_gradients(there, here, 1e-6 if dtype == torch.float32 else 1e-2)
    here, there = both(place, ops.normalize_rows, table[0])
    assert same_bits(here, there)
    here, there = gradients(place, ops.normalize_rows, [table[0]], [normal(60, width, seed=6, dtype=dtype)])
    assert_gradients(there, here, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
@pytest.mark.parametrize(("rows", "groups"), [(0, 1), (1, 1), (70, 1), (33, 3)])
def test_quantize(place, rows, groups, metric):
    x, codebook = normal(rows, groups, 8, seed=1), normal(groups, 64, 8, seed=2)
    here, there = both(place, ops.quantize, x, codebook, metric=metric)
    assert torch.equal(here.indices, there.indices) and same_bits(here.quantized, there.quantized)
    assert_near(there.loss, here.loss, 1e-6)
    upstream = [normal(rows, groups, 8, seed=3), torch.tensor(2.0)]
    here, there = gradients(place, ops.quantize, [x, codebook], upstream, metric=metric)
    assert_gradients(there, here, 1e-5)


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
@pytest.mark.parametrize("shape", [(0, 1, 5, 8), (33, 2, 700, 8), (600, 1, 130, 72), (5, 1, 40, 257)])
def test_entropy_loss(place, shape, metric):
    rows, groups, codes, width = shape
    x, codebook, options = normal(rows, groups, width, seed=1), normal(groups, codes, width, seed=2), {"metric": metric}
    options["temperature"] = 0.1 if metric == "cosine" else width**0.5
    here, there = both(place, ops.entropy_loss, x, codebook, **options)
    assert_near(torch.stack(there), torch.stack(here), 1e-5)
    upstream = [torch.tensor(1.5), torch.tensor(-1.0)]
    assert_gradients(*reversed(gradients(place, ops.entropy_loss, [x, codebook], upstream, **options)), 1e-4)


@pytest.mark.parametrize("shape", [(0, 5, 8, 3), (33, 700, 8, 8), (600, 130, 72, 70), (5, 40, 257, 1)])
def test_soft_quantize(place, shape):
    rows, codes, width, out = shape
    given = [normal(rows, width, seed=1), normal(codes, width, seed=2), normal(codes, out, seed=3)]
    here, there = both(place, ops.soft_quantize, *given, scale=width**-0.5)
    assert same_bits(here[0], there[0]) and torch.equal(here[1], there[1])
    upstream = [normal(rows, out, seed=4)]
    here, there = gradients(place, ops.soft_quantize, given, upstream, scale=width**-0.5)
    assert_gradients(there, here, 2e-5)


def test_statistics_and_moving_averages(place):
    x, ids = normal(500, 8, seed=1), torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(2))
    here, there = both(place, ops.code_statistics, x, ids, 50)
    assert torch.equal(here[0], there[0])
    assert_near(there[1], here[1], 1e-6)
    for options in ({"metric": "cosine"}, {"metric": "l2"}, {"metric": "cosine", "normalize_mean": True}):
        moved = []
        for put, backend in ((lambda v: v, "native"), (place.put, place.backend)):
            state = [put(v.clone()) for v in (normal(50, 8, seed=3), torch.ones(50), normal(50, 8, seed=3))]
            ops.ema_update_(*state, put(here[0]), put(here[1]), decay=0.9, **options, backend=backend)
            moved.append([v.cpu() for v in state])
        for a, b in zip(*moved):
            assert_near(b, a, 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", SCALES)
def test_multiscale(place, grid, mode):
    features, tables, options = case(grid, mode)
    call = lambda f, *t, **o: ops.multiscale_quantize(f, t, **o)  # noqa: E731
    here, there = both(place, call, features, *tables, **options)
    assert torch.equal(here.indices, there.indices) and same_bits(here.quantized, there.quantized)
    assert_near(there.loss, here.loss, 1e-5)
    upstream = [normal(*features.shape, seed=8), torch.tensor(2.0)]
    given = [features, *tables]
    if "phi" in options:
        weight, bias, *rest = options.pop("phi")
        call = lambda f, a, b, w, c, **o: ops.multiscale_quantize(f, (a, b), phi=(w, c, *rest), **o)  # noqa: E731
        given += [weight, bias]
    assert_gradients(*reversed(gradients(place, call, given, upstream, **options)), 2e-5)


@pytest.mark.parametrize("mode", ["cosine", "raw codes", "phi"])
@pytest.mark.parametrize("grid", SCALES)
def test_multiscale_from_indices(place, grid, mode):
    features, tables, options = case(grid, mode)
    ids = ops.multiscale_quantize(features, tables, **options, backend="native").indices
    call = lambda f, ids, *t, **o: ops.multiscale_rows(f, ids, t, **o)  # noqa: E731
    here, there = both(place, call, features, ids, *tables, **options)
    assert same_bits(here, there)
    options = decoding(options, SCALES[grid][0])
    here, there = both(place, lambda ids, *t, **o: ops.multiscale_decode(ids, t, **o), ids, *tables, **options)
    assert same_bits(here, there)
    for rule in ("accumulate", "chain") if "phi" not in options else ("accumulate",):
        call = lambda ids, *t, **o: ops.multiscale_inputs(ids, t, rule=rule, **o)  # noqa: E731,B023
        here, there = both(place, call, ids, *tables, **options)
        assert same_bits(here, there)
        call = lambda *t, ids, **o: ops.multiscale_inputs(ids, t, rule=rule, **o)  # noqa: E731,B023
        here, there = gradients(place, call, tables, [normal(*here.shape, seed=3)], ids=ids, **options)
        assert_gradients(there, here, 1e-5)


def test_values_that_are_not_numbers(place):
    """Counted where nothing may wait for the device, told by usage()."""
    quantizer = VectorQuantizer(8, 16, update="ema", channel_dim=-1).to(place.device).train()
    quantizer.backend = place.backend
    x = normal(20, 8, seed=1)
    x[3, 2], x[7, 0] = float("nan"), float("inf")
    before = _native.counts(-1 if place.device == "cpu" else 0)
    before.zero_()
    out = quantizer(place.put(x))
    assert out.indices[3] == 0 and out.indices[7] == 0 and bool(out.quantized[3].isnan().all())
    assert bool(out.loss.isfinite()) and all(bool(c.isfinite().all()) for c in quantizer.codebooks())
    assert before.tolist()[1] >= 2
    ids = torch.tensor([0, 99, -5, 15])
    rows = ops.lookup(place.put(ids), place.put(normal(16, 8, seed=2)), backend=place.backend).cpu()
    assert rows.isnan().all(-1).tolist() == [False, True, True, False] and before.tolist()[0] == 2
    if place.device == "cuda":
        with pytest.warns(RuntimeWarning, match="2 ids lay outside"):
            quantizer.usage()


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_modules_train(place, update):
    """Ten steps of a two-table multi-scale quantizer keep to the CPU's, ids included."""
    torch.manual_seed(0)
    made = [
        MultiScaleQuantizer(SharedIndexQuantizer((5, 3), 64, update=update, channel_dim=1), scales=(1, 2, 4))
        for _ in range(2)
    ]
    made[1].load_state_dict(made[0].state_dict())
    made[1].to(place.device)
    for module in made[1].modules():
        if hasattr(module, "backend"):
            module.backend = place.backend
    for step in range(10):
        x = normal(3, 8, 4, 4, seed=step)
        outs = [module(put(x).requires_grad_()) for module, put in zip(made, (lambda v: v, place.put))]
        assert torch.equal(outs[0].indices, outs[1].indices.cpu()), step
        for module, out in zip(made, outs):
            module.zero_grad()
            out.loss.backward() if update == "gradient" else None
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.1 * p.grad if p.grad is not None else 0
    for a, b in zip(made[0].codebooks(), made[1].codebooks()):
        assert_near(b.cpu(), a, 1e-4)


def test_what_has_no_kernel_runs_the_twin_after_one_warning(place):
    _native._warned.clear()
    x, table = place.put((normal(5, 8, seed=1).double(), normal(9, 8, seed=2).double()))
    with pytest.raises(RuntimeError, match="computes in float64"):
        ops.nearest_code(x, table, backend=place.backend)
    if place.device == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                ops.nearest_code(x, table)
        assert len(caught) == 1


gpu = pytest.mark.parametrize("place", [pytest.param("gpu", marks=GPU)], indirect=True)


@gpu
def test_stream_graph_and_second_device(place):
    """A captured step replays; another stream and another device are honoured."""
    x, table = place.put((normal(512, 8, seed=1), normal(1024, 8, seed=2)))
    expected = ops.quantize(x, table, backend="native")
    with torch.cuda.stream(torch.cuda.Stream()):
        ops.quantize(x, table, backend="native")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.quantize(x, table, backend="native")
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.indices, expected.indices) and torch.equal(out.quantized, expected.quantized)
    if torch.cuda.device_count() > 1:
        there = ops.quantize(x.to("cuda:1"), table.to("cuda:1"), backend="native")
        assert there.indices.device.index == 1 and torch.equal(there.indices.cpu(), expected.indices.cpu())
        assert torch.cuda.current_device() == 0
