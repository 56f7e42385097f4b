"""entropy_loss against its twin in float64, the published implementations' numbers, and the edges of api.md."""

import subprocess

import pytest
import torch
from golden_values import Case
from harness import (
    FLOATS,
    METRICS,
    assert_gradients,
    assert_near,
    assert_sentence,
    compiled,
    leaves,
    normal,
    opcheck,
    python,
    same_bits,
    with_threads,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import reference
from tokenflow_ext.ops import entropy_loss, nearest_code
from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer

SHAPES = [(1, 1, 1), (7, 1, 3), (67, 33, 1), (130, 100, 8), (300, 1500, 40)]


def inputs(rows, codes, width, groups=0, dtype=torch.float32):
    shapes = ((rows, groups, width), (groups, codes, width)) if groups else ((rows, width), (codes, width))
    return leaves(*(normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes, 1)))


def compare(x, codebook, tolerance, **options):
    """Values and gradients of both results against the twin in float64; a gradient is as rough as 1 / (N temperature)."""
    flat = [x, codebook] if isinstance(x, torch.Tensor) else [*x, *codebook]
    wide = leaves(*(t.double() for t in flat))
    pick = (lambda t: t) if isinstance(x, torch.Tensor) else (lambda t: (t[: len(x)], t[len(x) :]))
    found, expected = (
        entropy_loss(x, codebook, **options, backend="native"),
        reference.entropy_loss(*pick(wide), **options),
    )
    for part, (a, b) in enumerate(zip(found, expected)):
        assert a.shape == () and a.dtype == torch.promote_types(flat[0].dtype, torch.float32)
        assert_near(a, b, tolerance, f"result {part}", size=1.0)
        gradients = torch.autograd.grad(a, flat, retain_graph=True)
        exact = torch.autograd.grad(b, wide, retain_graph=True)
        assert_gradients(gradients, exact, 30 * tolerance, size=2 / len(flat[0]) / min(options["temperature"], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 0.2, 3.0])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "codes", "width"), SHAPES)
def test_values_and_gradients(rows, codes, width, metric, temperature, dtype):
    x, codebook = inputs(rows, codes, width, dtype=dtype)
    size = 1 if metric == "cosine" else 3 * width  # of a distance
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    compare(x, codebook, unit * max(20.0, 4 * size / temperature), metric=metric, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-7, 0.1])
def test_groups(eps, dtype):
    x, codebook = inputs(270, 300, 5, groups=3, dtype=dtype)
    compare(x, codebook, 5e-6 if dtype == torch.float32 else 1e-13, metric="cosine", temperature=0.1, eps=eps)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weights", [None, (1.0, 3.0), (0.0, 0.5)])
def test_shared_tables(weights, metric):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-13)):
        xs = leaves(normal(90, 6, seed=1, dtype=dtype), normal(90, 3, seed=2, dtype=dtype))
        tables = leaves(normal(70, 6, seed=3, dtype=dtype), normal(70, 3, seed=4, dtype=dtype))
        compare(xs, tables, tolerance, metric=metric, temperature=0.5, weights=weights)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("part", [0, 1])
def test_gradcheck(part, metric):
    x, codebook = inputs(5, 37, 3, dtype=torch.float64)
    run = lambda x, c: entropy_loss(x, c, metric=metric, temperature=0.4, backend="native")[part]  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, codebook))


@pytest.mark.parametrize(("x_type", "codebook_type"), [(a, b) for a in FLOATS for b in FLOATS])
def test_types(x_type, codebook_type):
    """Half types are upcast: exactly the result of their float32 values; gradients come back in the argument's type."""
    x, codebook = leaves(normal(40, 6, seed=1, dtype=x_type), normal(50, 6, seed=2, dtype=codebook_type))
    wide = torch.float64 if torch.float64 in (x_type, codebook_type) else torch.float32
    upcast = leaves(x.to(wide), codebook.to(wide))
    found, expected = (
        entropy_loss(*p, metric="l2", temperature=0.5, backend="native") for p in ((x, codebook), upcast)
    )
    assert all(same_bits(a, b) and a.dtype == wide for a, b in zip(found, expected))
    gradients, exact = torch.autograd.grad(found[0], (x, codebook)), torch.autograd.grad(expected[0], upcast)
    for leaf, a, b in zip((x, codebook), gradients, exact):
        assert same_bits(a, b.to(leaf.dtype))


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_threads_do_not_change_a_bit(temperature):
    x, codebook = inputs(600, 3000, 8)

    def step():
        out = entropy_loss(x, codebook, metric="cosine", temperature=temperature, backend="native")
        return *out, *torch.autograd.grad(out[0] - out[1], (x, codebook))

    first, *others = with_threads((1, 2, 3, 8, 64), step)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other))


SCRIPT = """
import hashlib, torch
from tokenflow_ext import build_info, ops
normal = lambda *shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
print(build_info()["instruction_set"])
for dtype in (torch.float32, torch.float64):
    x, codebook, values = (normal(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate([(67, 9), (171, 9), (171, 5)]))
    entropy = ops.entropy_loss(x, codebook, metric="cosine", temperature=0.1)
    soft = ops.soft_quantize(x, codebook, values)
    tensors = [*entropy, *soft, *torch.autograd.grad(entropy[0] - entropy[1], (x, codebook)),
               *torch.autograd.grad(soft[0].square().sum(), (x, codebook, values))]
    for tensor in tensors:
        print(hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    def run(isa: str) -> subprocess.CompletedProcess:
        return python(SCRIPT, TOKENFLOW_ISA=isa, OMP_NUM_THREADS="2")

    best, *expected = run("").stdout.split()
    assert len(expected) == 2 * 9
    for isa in ("baseline", "avx2", "avx512"):
        done = run(isa)
        assert done.stdout.split() == [isa, *expected] or "the best of this processor" in done.stderr, (
            best,
            done.stderr,
        )


def test_rows_and_codes_that_are_not_finite():
    """They are left out: the rest behaves as if they were not there, but for the mean's denominator."""
    x, codebook = (t.detach() for t in inputs(70, 90, 6))
    x[3, 2], x[60, 0], codebook[5, 1], codebook[80] = torch.nan, torch.inf, torch.nan, -torch.inf
    rows, codes = [i for i in range(70) if i not in (3, 60)], [k for k in range(90) if k not in (5, 80)]
    kept = leaves(x[rows], codebook[codes])
    for metric in METRICS:
        results = []
        for backend in ("native", "reference"):
            pair = leaves(x, codebook)
            with pytest.warns(RuntimeWarning, match="entropy_loss: 2 rows hold NaN or inf"):
                first, second = entropy_loss(*pair, metric=metric, temperature=0.3, backend=backend)
            gradients = torch.autograd.grad(first - second, pair)
            assert not gradients[0][[3, 60]].any() and not gradients[1][[5, 80]].any()
            results.append((first, *gradients))
            alone, _ = entropy_loss(*kept, metric=metric, temperature=0.3, backend=backend)
            assert_near(first, alone * 68 / 70, 1e-6)
        for a, b in zip(*results):
            assert_near(a, b, 2e-4)
    everything = torch.full_like(codebook, torch.nan)
    with pytest.warns(RuntimeWarning):
        assert entropy_loss(x, everything, metric="l2", temperature=1.0, backend="native")[0] == 0


def test_empty_batch_and_single_code():
    x, codebook = inputs(0, 5, 4)
    out = entropy_loss(x, codebook, metric="cosine", temperature=0.1, backend="native")
    assert [v.item() for v in out] == [0.0, 0.0]
    assert not torch.autograd.grad(out[0] - out[1], (x, codebook))[1].any()
    first, second = entropy_loss(*inputs(3, 1, 4), metric="cosine", temperature=0.1, eps=0.0, backend="native")
    assert first == 0 and second == 0


def test_underflow_is_rounding():
    """At temperature 0.001 nearly every p is 0 in float32 too; the loss and its gradients stay those of the twin."""
    x, codebook = inputs(200, 2000, 8, dtype=torch.float64)
    compare(x, codebook, 1e-11, metric="cosine", temperature=0.001)


def test_views():
    x, codebook = normal(8, 60, seed=1).T, normal(3, 8, 50, seed=2)[1].T
    out = entropy_loss(x, codebook, metric="cosine", temperature=1.0, backend="native")
    packed = entropy_loss(x.contiguous(), codebook.contiguous(), metric="cosine", temperature=1.0, backend="native")
    assert all(same_bits(a, b) for a, b in zip(out, packed))
    batch = entropy_loss(x.reshape(3, 4, 5, 8), codebook, metric="cosine", temperature=1.0, backend="native")
    assert all(same_bits(a, b) for a, b in zip(batch, packed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), codes=st.integers(1, 80), width=st.integers(1, 20), metric=st.sampled_from(METRICS),
    temperature=st.floats(0.01, 10), scale=st.floats(0.01, 30), seed=st.integers(0, 9),
)  # fmt: skip
def test_entropies_have_their_bounds(rows, codes, width, metric, temperature, scale, seed):
    x, codebook = normal(rows, width, seed=seed) * scale, normal(codes, width, seed=seed + 50) * scale
    first, second = entropy_loss(x, codebook, metric=metric, temperature=temperature, eps=0.0, backend="native")
    highest = torch.tensor(float(codes)).log() * (1 + 1e-5) + 1e-5
    assert 0 <= first <= highest and -1e-5 <= second <= highest
    assert first <= second + 1e-4 * (1 + second), "the entropy of a mean is at least the mean entropy"


def test_equal_codes_are_as_unsure_as_it_gets():
    first, second = entropy_loss(normal(50, 4), torch.ones(64, 4), metric="l2", temperature=0.01, eps=0.0)
    assert_near(torch.stack([first, second]), torch.full((2,), 64.0).log(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [1e-8, 1e-12, 1e-20, 1e-30])
def test_a_temperature_that_leaves_one_code_each(temperature, metric, dtype):
    """Logits of 1e9 and more, whose spacing is wider than what may be left out of a softmax: p is the one-hot of the search."""
    x, codebook = normal(300, 16, seed=1, dtype=dtype), normal(100, 16, seed=2, dtype=dtype)
    ids = nearest_code(x, codebook, metric=metric)
    first, second = entropy_loss(x, codebook, metric=metric, temperature=temperature, backend="native")
    share = torch.bincount(ids, minlength=100).double() / 300
    assert first == 0
    assert_near(second, -(share * (share + 1e-5).log()).sum(), 1e-6)


def test_second_derivative_raises():
    x, codebook = inputs(4, 5, 2)
    first, _ = entropy_loss(x, codebook, metric="dot", temperature=1.0, backend="native")
    (gradient,) = torch.autograd.grad(first, x, create_graph=True)
    with pytest.raises(RuntimeError, match="entropy_loss.*once"):
        torch.autograd.grad(gradient.sum(), x)


def test_only_what_is_wanted():
    """A frozen codebook, a detached encoder, or one of the two results alone."""
    x, codebook = inputs(40, 60, 8)
    options = {"metric": "cosine", "temperature": 0.1, "backend": "native"}
    both = torch.autograd.grad(entropy_loss(x, codebook, **options)[1], (x, codebook))
    (alone,) = torch.autograd.grad(entropy_loss(x, codebook.detach(), **options)[1], x)
    (codes,) = torch.autograd.grad(entropy_loss(x.detach(), codebook, **options)[1], codebook)
    assert same_bits(alone, both[0]) and same_bits(codes, both[1])


def test_compiled_and_registered():
    x, codebook = inputs(20, 30, 4, groups=2)
    run = lambda x, c: entropy_loss(x, c, metric="l2", temperature=0.5, backend="native")  # noqa: E731
    found, expected = compiled(run)(x, codebook), run(x, codebook)
    assert all(same_bits(a, b) for a, b in zip(found, expected))
    gradients = (torch.autograd.grad(out[0] - out[1], (x, codebook)) for out in (found, expected))
    assert all(same_bits(a, b) for a, b in zip(*gradients))
    opcheck("entropy_loss", x, codebook, torch.ones(20, 2, dtype=torch.bool), 1e-5)


BAD = {
    "x": (TypeError, {"x": None}),
    "x width": (ValueError, {"x": torch.zeros(3, 5)}),
    "codebook": (ValueError, {"codebook": torch.zeros(0, 4)}),
    "metric": (ValueError, {"metric": "cos"}),
    "temperature": (ValueError, {"temperature": 0.0}),
    "temperature type": (TypeError, {"temperature": "hot"}),
    "eps": (ValueError, {"eps": -1e-5}),
    "weights": (ValueError, {"weights": (1.0,)}),
    "backend": (ValueError, {"backend": "cuda"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, change = BAD[name]
    call = {"x": torch.zeros(3, 4), "codebook": torch.zeros(6, 4), "metric": "l2", "temperature": 1.0, **change}
    argument = "xs" if name == "x" else name.split()[0]
    assert_sentence(error, "entropy_loss", argument, entropy_loss, call.pop("x"), call.pop("codebook"), **call)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ["entropy", "entropy_unscaled_small"])
def test_published_dual_tables(name, backend):
    case = Case("tokenflow_quantizer", name)
    leaf = {key: case[key].requires_grad_() for key in ("z", "sem_table", "pix_table")}
    xs = leaf["z"].movedim(1, -1).split(case.options["table_dims"], dim=-1)
    temperature = case.options["entropy_temperature"]
    first, second = entropy_loss(
        xs, (leaf["sem_table"], leaf["pix_table"]), metric="cosine", temperature=temperature, backend=backend
    )
    loss = case.options["entropy_ratio"] * (first - second)
    assert abs(loss.item() - case.scalars["entropy_loss"]) <= 2e-6
    gradients = torch.autograd.grad(loss, list(leaf.values()))
    for gradient, key in zip(gradients, ("grad_z_entropy", "grad_sem_entropy", "grad_pix_entropy")):
        case.check("entropy_gradient", gradient, case[key])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_published_multi_codebook(name, backend):
    case = Case("unitok_quantizer", name)
    z, tables = leaves(case["z"], case["tables"])
    groups, _, width = tables.shape
    options = {"temperature": case.options["entropy_temperature"], "eps": case.options["entropy_eps"]}
    first, second = entropy_loss(z.unflatten(-1, (groups, width)), tables, metric="cosine", **options, backend=backend)
    assert abs((first - second).item() - case.scalars["entropy_loss"]) <= 4e-6
    gradients = torch.autograd.grad(first - second, (z, tables))
    for gradient, key in zip(gradients, ("grad_z_entropy", "grad_tables_entropy")):
        assert_near(gradient, case[key], 2e-4, key, size=1e-2)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ["ibq/small", "ibq/wide"])
def test_published_dot(name, backend):
    case = Case("related_quantizers", name)
    z, codebook = leaves(case["z"], case["codebook"])
    options = {"temperature": case.options["entropy_temperature"], "eps": case.options["entropy_eps"]}
    first, second = entropy_loss(z.movedim(1, -1), codebook, metric="dot", **options, backend=backend)
    assert abs(first.item() - case.scalars["sample_entropy"]) <= 1e-5
    assert abs(second.item() - case.scalars["average_entropy"]) <= 1e-5
    gradients = torch.autograd.grad(first - second, (z, codebook))
    for gradient, key in zip(gradients, ("grad_z_entropy", "grad_codebook_entropy")):
        case.check("gradient", gradient, case[key])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ["fqgan/dual", "fqgan/triple"])
def test_published_branches(name, backend):
    case = Case("related_quantizers", name)
    z, tables = leaves(case["z"], case["codebooks"])
    total = 0
    for g, (part, table) in enumerate(zip(z, tables)):
        first, second = entropy_loss(
            part.movedim(1, -1), table, metric="cosine", temperature=0.01, eps=1e-5, backend=backend
        )
        loss = case.options["entropy_ratio"] * (first - second)
        assert abs(loss.item() - case.scalars[f"entropy_loss_{g}"]) <= 1e-5
        total = total + loss
    for gradient, key in zip(torch.autograd.grad(total, (z, tables)), ("grad_z_entropy", "grad_codebooks_entropy")):
        case.check("gradient", gradient, case[key])


def test_modules_stream():
    """A training step of each module with an entropy term calls the native op: no dense twin, whatever the scale."""
    seen = []
    native = torch.ops.tokenflow_ext.entropy_loss.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    options = {"entropy_weight": 0.1, "backend": "native"}
    for module, x in (
        (VectorQuantizer(8, 64, **options), normal(30, 8)),
        (VectorQuantizer(8, 64, groups=2, **options), normal(30, 8)),
        (MultiScaleQuantizer(SharedIndexQuantizer((6, 2), 64, **options), (1, 2, 4)), normal(2, 8, 4, 4)),
    ):
        seen.clear()
        with Watch():
            module(x)
        assert seen.count(native) == (3 if isinstance(module, MultiScaleQuantizer) else 1)
