"""entropy_loss and soft_quantize on the emulated kernels: the CPU's results but for rounding, the twin's in float64."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from harness import METRICS, assert_gradients, assert_near, leaves, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenflow_ext import ops, reference
from tokenflow_ext.ops import _native
from tokenflow_ext.ops._native import counts

HALVES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SIZES = [(1, 1, 8), (2, 31, 32), (1, 4097, 8), (1, 600, 40), (1, 140, 72), (3, 31, 257)]
"""Groups, codes, widths: one copy of channels and several, ranges of codes, more channels than are added at once."""


def entropy(x, codebook, upstream=(1.5, -1.0), **options):
    """The two losses and the gradients of x and the codebook."""
    inputs = leaves(x, codebook)
    call = reference.entropy_loss if "backend" not in options else ops.entropy_loss
    first, second = call(*inputs, **options)
    gradients = torch.autograd.grad(first * upstream[0] + second * upstream[1], inputs)
    return [first.detach(), second.detach(), *gradients]


def soft(x, keys, values, upstream, **options):
    """The quantized rows and the gradients of x, keys and values."""
    inputs = leaves(x, keys, values)
    call = reference.soft_quantize if "backend" not in options else ops.soft_quantize
    quantized, _ = call(*inputs, **options)
    return [quantized.detach(), *torch.autograd.grad(quantized, inputs, upstream.to(quantized.dtype))]


def assert_close(found, expected, tolerance, values):
    """The first `values` results are values, the rest gradients, in the types of their inputs."""
    for part, (a, b) in enumerate(zip(found[:values], expected)):
        assert_near(a, b, tolerance, f"result {part}", size=1.0)
    rounding = max([ROUNDOFF[g.dtype] for g in found[values:]] + [0.0])
    size = max([float(b.abs().max()) for b in expected[values:] if b.numel()] + [1e-3])
    assert_gradients(found[values:], expected[values:], max(30 * tolerance, 2 * rounding), size)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize(("groups", "codes", "width"), SIZES)
def test_entropy_loss(rows, groups, codes, width, metric):
    """Inputs of half types, as users have them: their float32 values are what counts."""
    dtype = HALVES[(rows + width) % 3]
    x, codebook = normal(rows, groups, width, seed=1, dtype=dtype), normal(groups, codes, width, seed=2)
    options = {"metric": metric, "temperature": 0.3}
    size = 1 if metric == "cosine" else 3 * width
    tolerance = ROUNDOFF[torch.float32] * max(20.0, 4 * size / 0.3)
    emulated = entropy(x, codebook, **options, backend="emulated")
    assert_close(emulated, entropy(x, codebook, **options, backend="native"), tolerance, 2)
    assert_close(emulated, entropy(x.double(), codebook.double(), **options), tolerance, 2)


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize(
    ("codes", "width", "out"), [(1, 8, 8), (31, 32, 1), (4097, 8, 3), (600, 40, 40), (140, 72, 9), (31, 257, 130)]
)
def test_soft_quantize(rows, codes, width, out):
    dtype = HALVES[(rows + width) % 3]
    x, keys, values = normal(rows, width, seed=1, dtype=dtype), normal(codes, width, seed=2), normal(codes, out, seed=3)
    upstream, scale = normal(rows, out, seed=4, dtype=dtype), 1 / width**0.5
    emulated = soft(x, keys, values, upstream, scale=scale, backend="emulated")
    native = soft(x, keys, values, upstream, scale=scale, backend="native")
    assert same_bits(emulated[0], native[0]), "forward is a search and a gather"
    assert_close(emulated, native, 5e-7, 1)
    exact = soft(x.double(), keys.double(), values.double(), upstream, scale=scale)
    assert_close(emulated[1:], exact[1:], 5e-7, 0)


@pytest.mark.parametrize("weights", [None, (0.2, 3.0)])
def test_shared_tables(weights):
    xs, tables = [normal(50, w, seed=w) for w in (32, 8)], [normal(300, w, seed=1 + w) for w in (32, 8)]
    results = []
    for backend in ("emulated", "native"):
        inputs = leaves(*xs, *tables)
        options = {"metric": "l2", "temperature": 5.0, "weights": weights, "backend": backend}
        first, second = ops.entropy_loss(inputs[:2], inputs[2:], **options)
        results.append([first.detach(), second.detach(), *torch.autograd.grad(first - second, inputs)])
    assert_close(*results, 2e-5, 2)


@pytest.mark.parametrize("width", [5, 72])
def test_every_schedule_gives_the_same_bits(width, schedule, core):
    """Several tiles, ranges of both sides."""
    import emulator

    x, codebook, upstream = normal(600, 1, width, seed=1), normal(1, 530, width, seed=2), normal(600, 3, seed=3)

    def step():
        made = entropy(x, codebook, metric="cosine", temperature=0.1, backend="emulated")
        return made + soft(x[:, 0], codebook[0], normal(530, 3, seed=4), upstream, backend="emulated")

    found = step()
    emulator.configure(core, "forward")
    assert all(same_bits(a, b) for a, b in zip(found, step()))


def best(x, codebook):
    """Ids [N, G] of the highest logits."""
    return torch.einsum("ngc,gkc->ngk", x, codebook).argmax(-1)


def outputs(guarded, rows, groups, codes, width):
    """What entropy_loss and its backward write, amid guards, a number off their alignment."""
    forward = [
        guarded(2, shift=1),
        guarded(groups, rows, shift=1),
        guarded(groups, rows),
        guarded(groups, codes, shift=1),
    ]
    return forward, guarded(rows, groups, width, shift=1), guarded(groups, codes, width, shift=1)


@pytest.mark.parametrize("width", [1, 9, 70])
@pytest.mark.parametrize("rows", [1, 65, 600])
def test_everything_entropy_loss_writes(rows, width, core, guarded):
    """Slices [1:] in, outputs amid guards, ids -1 and outside, rows and codes that are not finite: all as on the CPU."""
    x, codebook = normal(rows + 1, 2, width, seed=1)[1:], normal(3, 140, width, seed=2)[1:]
    codebook[0, 7, 0], codebook[1, 139] = torch.inf, torch.nan
    ids = best(x, codebook.nan_to_num(0, 0, 0))
    if rows > 10:
        x[3, 0, 0], x[4, 1, 0] = torch.nan, torch.inf
        ids[5, 0], ids[6, 1], ids[7, 0], ids[8, 1] = -1, 140, 2**40, 139
    upstream = torch.tensor([0.0, 1.5, -0.7])[1:]
    forward, grad_x, grad_codebook = outputs(guarded, rows, 2, 140, width)
    plain = [torch.empty_like(t) for t in (*forward, grad_x, grad_codebook)]
    core.entropy_loss(x, codebook, ids, 1e-5, *forward, -1, 0, None)
    core.entropy_loss_backward(x, codebook, ids, 1e-5, *forward[1:], upstream, grad_x, grad_codebook, -1, 0, None)
    _native._C.entropy_loss(x, codebook, ids, 1e-5, *plain[:4], 1)
    _native._C.entropy_loss_backward(x, codebook, ids, 1e-5, *plain[1:4], upstream, *plain[4:], 1)
    for name, a, b in zip(("losses", "log Z", "H", "means"), forward, plain):
        assert_near(a, b, 2e-6, name, size=1.0 if name != "means" else 0)
    assert_gradients([grad_x, grad_codebook], plain[4:], 1e-5)
    if rows > 10:
        assert not grad_x[[3, 5, 7], 0].any() and not grad_x[[4, 6, 8], 1].any()
    assert not grad_codebook[0, 7].any() and not grad_codebook[1, 139].any()
    alone, codes_alone = guarded(rows, 2, width), guarded(2, 140, width)
    core.entropy_loss_backward(x, codebook, ids, 1e-5, *forward[1:], upstream, alone, None, -1, 0, None)
    core.entropy_loss_backward(x, codebook, ids, 1e-5, *forward[1:], upstream, None, codes_alone, -1, 0, None)
    assert same_bits(alone, grad_x) and same_bits(codes_alone, grad_codebook)


@pytest.mark.parametrize(("width", "out"), [(1, 1), (9, 5), (70, 65)])
@pytest.mark.parametrize("rows", [1, 65, 600])
def test_everything_soft_quantize_writes(rows, width, out, core, guarded):
    x, keys, values = (t[1:] for t in (normal(rows + 1, 2, width), normal(3, 140, width), normal(3, 140, out, seed=3)))
    ids, grad = best(x, keys), normal(rows + 1, 2, out, seed=4)[1:]
    keys[0, 7], values[1, 9, 0] = torch.nan, torch.inf
    if rows > 10:
        x[3, 0, 0], ids[5, 0], ids[6, 1] = torch.nan, -1, 140
    made = [guarded(rows, 2, width, shift=1), guarded(2, 140, width, shift=1)]
    plain = [torch.empty_like(t) for t in made]
    core.soft_quantize_backward(x, keys, values, ids, grad, *made, -1, 0, None)
    _native._C.soft_quantize_backward(x, keys, values, ids, grad, *plain, 1)
    assert_gradients(made, plain, 3e-6)
    assert not made[1][0, 7].any() and (rows < 10 or not made[0][[3, 5], 0].any() and not made[0][6, 1].any())


def test_gradients_that_are_not_finite_are_not_lost():
    """As a gradient scaler looks for them: where the CPU has NaN; but a row that is left out stays at 0."""
    x, keys, values, upstream = (
        normal(40, 6, seed=1),
        normal(50, 6, seed=2),
        normal(50, 4, seed=3),
        normal(40, 4, seed=4),
    )
    upstream[5, 2], upstream[7], x[9, 0] = torch.inf, torch.nan, torch.nan
    for backend in ("emulated", "native"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            _, grad_x, grad_keys, _ = soft(x, keys, values, upstream, backend=backend)
        assert (~grad_x.isfinite()).all(1).nonzero().flatten().tolist() == [5, 7] and not grad_x[9].any()
        assert not grad_keys.isfinite().any()
    made = entropy(x[:5], keys, (torch.nan, 1.0), metric="cosine", temperature=1.0, backend="emulated")
    assert made[2].isnan().all() and made[3].isnan().all()
    counts(-1).zero_()


def kernels(core) -> list[str]:
    return [launch[0].split("<")[0].removesuffix("_kernel") for launch in core.take_launches()]


@pytest.mark.parametrize(("rows", "codes", "ranges"), [(40, 500, []), (600, 700, ["ranges"])])
def test_launches_depend_on_the_sizes_alone(rows, codes, ranges, core):
    """As graphs that are captured once need."""
    packs, seen = ["pack", "pack", "tops"], []
    for value in (0.0, 1.0, torch.nan):
        x, codebook, values = torch.full((rows, 1, 3), value), normal(1, codes, 3), normal(1, codes, 2)
        ids, grad = torch.zeros(rows, 1, dtype=torch.int64), normal(rows, 1, 2)
        saved = torch.empty(2), torch.empty(1, rows), torch.empty(1, rows), torch.empty(1, codes)
        gradients = torch.empty_like(x), torch.empty_like(codebook)
        core.take_launches()
        core.entropy_loss(x, codebook, ids, 1e-5, *saved, -1, 0, None)
        assert kernels(core) == [*packs, "sweep", "entropies", "sweep", "means", "mean", "mean"]
        core.entropy_loss_backward(x, codebook, ids, 1e-5, *saved[1:], saved[0], *gradients, -1, 0, None)
        launches = core.take_launches()
        assert len(launches) == 8 + 2 * len(ranges)
        core.soft_quantize_backward(x, codebook, values, ids, grad, *gradients, -1, 0, None)
        seen.append([launches, core.take_launches()])
    assert seen[0] == seen[1] == seen[2]
    names = [launch[0].split("<")[0].removesuffix("_kernel") for launch in seen[0][1]]
    assert names == ["pack", "pack", *packs, "sweep", "totals", "spread", *ranges, "spread", *ranges]


class Enough(Exception):
    pass


@pytest.mark.parametrize(("rows", "codes", "width"), [(100000, 262144, 8), (2720, 32768, 40), (64, 262144, 256)])
def test_scratch_grows_with_rows_and_codes_alone(rows, codes, width, core):
    """Asked for, and not given: nothing of size N x K, and no more partial sums than 512 tiles have."""
    asked = []

    def allocate(size, device):
        asked.append(size)
        raise Enough

    x, codebook, values = (torch.empty(*s) for s in ((rows, 1, width), (1, codes, width), (1, codes, 3)))
    ids, grad = torch.empty(rows, 1, dtype=torch.int64), torch.empty(rows, 1, 3)
    saved = [torch.empty(2), torch.empty(1, rows), torch.empty(1, rows), torch.empty(1, codes)]
    core.connect(torch.Tensor, None, torch.utils.dlpack.to_dlpack, allocate)
    try:
        for call in (
            lambda: core.entropy_loss(x, codebook, ids, 1e-5, *saved, -1, 0, None),
            lambda: core.entropy_loss_backward(x, codebook, ids, 1e-5, *saved[1:], saved[0], x, codebook, -1, 0, None),
            lambda: core.soft_quantize_backward(x, codebook, values, ids, grad, x, codebook, -1, 0, None),
        ):
            with pytest.raises(Enough):
                call()
    finally:
        _native.connect(core)
    items, wide = rows + codes + 256, width + 8
    assert len(asked) == 3
    for size in asked:
        assert size <= 4 * (items * (wide + 8 + 8) + 512 * 64 * wide + 4 * items) + 4096, size / 4 / items


def test_what_cuda_does_not_compute_is_refused(core):
    x, codebook, ids = normal(3, 1, 2), normal(1, 4, 2), torch.zeros(3, 1, dtype=torch.int64)
    saved = [torch.empty(2), torch.empty(1, 3), torch.empty(1, 3), torch.empty(1, 4)]
    sentence = "entropy_loss: wanted contiguous float32 x .* on CUDA"
    for a, b in ((x.double(), codebook.double()), (x.half(), codebook), (x.transpose(0, 2), codebook)):
        with pytest.raises(ValueError, match=sentence):
            core.entropy_loss(a, b, ids, 1e-5, *saved, -1, 0, None)
    with pytest.raises(ValueError, match="ids: wanted int64"):
        core.entropy_loss(x, codebook, ids[:2], 1e-5, *saved, -1, 0, None)
    with pytest.raises(ValueError, match="wanted outputs that fit"):
        core.entropy_loss(x, codebook, ids, 1e-5, torch.empty(1), *saved[1:], -1, 0, None)
    with pytest.raises(ValueError, match="entropy_loss_backward: wanted gradients"):
        core.entropy_loss_backward(x, codebook, ids, 1e-5, *saved[1:], saved[0], x[1:], None, -1, 0, None)
    with pytest.raises(ValueError, match="soft_quantize: wanted contiguous float32"):
        core.soft_quantize_backward(x, codebook, codebook.double(), ids, x, x, codebook, -1, 0, None)
    with pytest.raises(ValueError, match="as many codes as values"):
        core.soft_quantize_backward(x, codebook, codebook[:, :3].contiguous(), ids, x, x, codebook, -1, 0, None)


def test_no_function_falls_back_on_cuda(core, monkeypatch):
    """What "auto" asks about CUDA tensors, which it asks of their device and type alone: every function has its kernels."""
    monkeypatch.setattr(_native, "_C", SimpleNamespace(cuda=core))
    monkeypatch.setattr(_native, "_warned", set())
    names = [name for name in ops.__all__ if name != "build_info"]
    assert {"entropy_loss", "soft_quantize"} <= set(names) and {*_native.KERNELS} <= set(names)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.empty(3, 2, device="cuda")
        assert all(_native.use_native(name, "auto", x) for name in names)
    with FakeTensorMode(), pytest.warns(UserWarning, match="no kernel for cuda .* float64"):
        assert not _native.use_native("entropy_loss", "auto", torch.empty(3, 2, device="cuda", dtype=torch.float64))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 150), codes=st.integers(1, 300), width=st.integers(1, 80), groups=st.integers(1, 3),
    out=st.integers(1, 40), seed=st.integers(0, 99), metric=st.sampled_from(METRICS), eps=st.sampled_from([0.0, 1e-5, 0.1]),
)  # fmt: skip
def test_any_shape(rows, codes, width, groups, out, seed, metric, eps):
    x, codebook = normal(rows, groups, width, seed=seed), normal(groups, codes, width, seed=seed + 1)
    options = {"metric": metric, "temperature": width**0.5, "eps": eps}
    assert_close(*(entropy(x, codebook, **options, backend=b) for b in ("emulated", "native")), 1e-5, 2)
    values, upstream = normal(codes, out, seed=seed + 2), normal(rows, out, seed=seed + 3)
    made = [soft(x[:, 0], codebook[0], values, upstream, scale=0.3, backend=b) for b in ("emulated", "native")]
    assert_close(*made, 1e-6, 1)
