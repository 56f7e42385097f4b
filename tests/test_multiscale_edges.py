"""The multi-scale ops at their edges: low precision, NaN, dropped scales, empty batches, invariance, bad input."""

import pytest
import torch
from harness import assert_near, assert_sentence, leaves, normal, python, same_bits, with_threads
from multiscale_cases import MODES, WIDTHS, case, decoding, followed, phi_of

from tokenflow_ext import build_info, ops, reference

NINE = [1, 2, 4, 6, 8, 10, 12, 14, 16]


def low_precision_ids(features, codebooks, scales):
    """The loop with resampling, normalisation and search all in the features' type, as a bfloat16 model runs it."""
    dims = [c.shape[1] for c in codebooks]
    residual, ids = features, []
    tables = [torch.nn.functional.normalize(c.to(features.dtype), dim=-1) for c in codebooks]
    for s in scales:
        rows = torch.nn.functional.adaptive_avg_pool2d(residual, s).flatten(2).transpose(1, 2)
        parts = [torch.nn.functional.normalize(p, dim=-1) for p in rows.split(dims, dim=-1)]
        index = sum(p @ t.T for p, t in zip(parts, tables)).argmax(dim=-1)
        codes = torch.cat([t[index] for t in tables], dim=-1).transpose(1, 2).unflatten(2, (s, s))
        residual = residual - torch.nn.functional.interpolate(codes, size=residual.shape[2:], mode="bicubic")
        ids.append(index)
    return torch.cat(ids, dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_of_a_low_precision_model(dtype):
    """Exactly those of float32 arithmetic on the same features, under autocast too; the same loop in the type loses many."""
    features = normal(2, 40, 16, 16, seed=1).to(dtype)
    codebooks = [normal(2048, 32, seed=2), normal(2048, 8, seed=3)]
    expected = ops.multiscale_quantize(features.float(), codebooks, scales=NINE, backend="native")
    with torch.autocast("cpu", dtype):
        got = ops.multiscale_quantize(features, codebooks, scales=NINE, backend="native")
        decoded = ops.multiscale_decode(got.indices, codebooks, scales=NINE, size=16, backend="native")
    assert torch.equal(got.indices, expected.indices)
    followed(features, codebooks, got.indices, {"scales": NINE})
    assert same_bits(got.quantized, expected.quantized.to(dtype)) and same_bits(decoded, expected.quantized)
    assert got.loss.dtype == torch.float32 and same_bits(got.loss, expected.loss)
    lost = (low_precision_ids(features, codebooks, NINE) != expected.indices).float().mean()
    print(f"{dtype}: 0 of {expected.indices.numel()} tokens changed; {float(lost):.1%} in the same loop run in {dtype}")
    assert lost > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients(dtype):
    features, codebooks, options = case("square", "cosine")
    inputs = leaves(features.to(dtype), *(c.to(dtype) for c in codebooks))
    quantized, _, loss = ops.multiscale_quantize(inputs[0], inputs[1:], **options, backend="native")
    assert quantized.dtype == dtype
    grads = torch.autograd.grad(quantized.float().square().sum() + loss, inputs)
    wide = leaves(*(i.double() for i in inputs))
    expected = reference.multiscale_quantize(wide[0], wide[1:], **options)
    expected = torch.autograd.grad((2 * quantized.double().detach() * expected.quantized).sum() + expected.loss, wide)
    for a, b in zip(grads, expected):
        assert a.dtype == dtype
        assert_near(a, b, 2e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*rows hold NaN:RuntimeWarning")
def test_values_that_are_not_numbers(mode, value):
    """Rows that a bad pixel reaches: id 0, NaN codes, no part in loss and gradients; the other image is untouched."""
    results = []
    for function in (lambda *a, **k: ops.multiscale_quantize(*a, **k, backend="native"), reference.multiscale_quantize):
        _, codebooks, options = case("square", mode, torch.float64)
        features = normal(3, 8, 16, 9, seed=1, dtype=torch.float64)
        features[0, 2, 1, 3] = value
        options["scales"] = [6, (16, 9)]
        if "phi" in options:
            options["phi"] = phi_of(options["scales"], torch.float64)
        inputs = leaves(features, *codebooks)
        out = function(inputs[0], inputs[1:], **options)
        seen = torch.where(out.quantized.isnan(), 0.0, out.quantized * normal(*out.quantized.shape, seed=5))
        grads = torch.autograd.grad(seen.sum() + out.loss, inputs)
        results.append((out, grads))
    (out, grads), (twin, twin_grads) = results
    assert int((out.indices != twin.indices).sum()) == 0
    assert 0 < int(out.quantized[0].isnan().sum()) < out.quantized[0].numel() and not out.quantized[1:].isnan().any()
    assert_near(out.quantized, twin.quantized, 1e-13)
    assert_near(out.loss, twin.loss, 1e-13)
    assert out.loss.isfinite()
    for a, b in zip(grads, twin_grads):
        assert a.isfinite().all()
        assert_near(a, b, 1e-12)
    rows = [f.multiscale_rows(features, out.indices, codebooks, **options) for f in (ops, reference)]
    assert_near(*rows, 1e-13)
    bad = rows[0].isnan().any(-1)
    assert bad[0].any() and not bad[1:].any() and torch.equal(bad, rows[0].isnan().all(-1))
    assert not out.indices[bad].any()


@pytest.mark.filterwarnings("ignore:.*rows hold NaN:RuntimeWarning")
def test_one_bad_pixel_of_a_whole_pyramid():
    """From a 1 x 1 scale on, one NaN takes its whole image with it and nothing else."""
    features, codebooks, options = case("square", "cosine")
    clean = ops.multiscale_quantize(features, codebooks, **options, backend="native")
    features[1, 0, 2, 2] = torch.nan
    out = ops.multiscale_quantize(features, codebooks, **options, backend="native")
    assert out.quantized[1].isnan().all() and not out.indices[1].any()
    for b in (0, 2):
        assert same_bits(out.quantized[b], clean.quantized[b]) and torch.equal(out.indices[b], clean.indices[b])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_dropped_scales(backend):
    """-1 for every id of a scale in an image: nothing is added, subtracted or learned there."""
    features, codebooks, options = case("square", "cosine", torch.float64)
    ids = ops.multiscale_quantize(features, codebooks, **options).indices
    full, part = ids.clone(), torch.cat([ids[:, :1], ids[:, 5:]], dim=1)
    full[0, 1:5] = -1
    common = {"scales": options["scales"], "backend": backend}
    short = {"scales": [1, 3, 5], "backend": backend}
    decoded = ops.multiscale_decode(full, codebooks, **common, size=5)
    assert same_bits(decoded[0], ops.multiscale_decode(part, codebooks, **short, size=5)[0])
    assert same_bits(decoded[1:], ops.multiscale_decode(ids, codebooks, **common, size=5)[1:])
    rows = ops.multiscale_rows(features, full, codebooks, **common)
    expected = ops.multiscale_rows(features, part, codebooks, **short)
    assert same_bits(rows[0][full[0] >= 0], expected[0]) and not rows[0, 1:5].any()
    for rule in ("accumulate", "chain"):
        tables = leaves(*codebooks)
        inputs = ops.multiscale_inputs(full, tables, **common, size=5, rule=rule)
        assert_near(
            inputs, reference.multiscale_inputs(full, tables, scales=options["scales"], size=5, rule=rule), 1e-13
        )
        only = [ops.multiscale_inputs(full[:1], tables, **common, size=5, rule=rule).sum()]
        touched = torch.zeros(len(codebooks[0]), dtype=torch.bool)
        touched[full[0, :14][full[0, :14] >= 0]] = True
        for grad in torch.autograd.grad(only, tables):
            assert not grad[~touched].any()


def test_shapes_at_the_edges():
    codebooks = [normal(1, w, seed=w) for w in WIDTHS]
    for batch, size, scales in [(0, (4, 4), [1, 4]), (1, (1, 1), [1]), (2, (3, 3), [3]), (1, (1, 5), [(1, 2), (1, 5)])]:
        inputs = leaves(normal(batch, 8, *size), *codebooks)
        length = sum(s * s if isinstance(s, int) else s[0] * s[1] for s in scales)
        for mode in ({}, {"loss_on": "accumulated", "phi": phi_of(scales)}):
            out = ops.multiscale_quantize(inputs[0], inputs[1:], scales=scales, **mode, backend="native")
            assert (
                out.quantized.shape == (batch, 8, *size)
                and out.indices.shape == (batch, length)
                and not out.indices.any()
            )
            assert out.loss.shape == () and (batch > 0 or float(out.loss.detach()) == 0)
            grads = torch.autograd.grad(out.quantized.sum() + out.loss, inputs)
            assert all(g.shape == i.shape and g.isfinite().all() for g, i in zip(grads, inputs))
        rows = ops.multiscale_rows(inputs[0], out.indices, codebooks, scales=scales, backend="native")
        assert rows.shape == (batch, length, 8)
        empty = out.indices[:, :0]
        assert not ops.multiscale_decode(empty, codebooks, scales=scales, size=size, backend="native").any()
        for rule in ("accumulate", "chain"):
            for ids, expected in ((empty, 0), (out.indices, length - _cells(scales[0]))):
                made = ops.multiscale_inputs(ids, codebooks, scales=scales, size=size, rule=rule, backend="native")
                assert made.shape == (batch, expected, 8)


def _cells(scale):
    return scale * scale if isinstance(scale, int) else scale[0] * scale[1]


def test_views_that_are_not_contiguous():
    features, codebooks, options = case("oblong", "cosine")
    expected = ops.multiscale_quantize(features, codebooks, **options, backend="native")
    strided = features.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = [torch.cat([c, c], dim=1)[:, : c.shape[1]] for c in codebooks]
    assert not strided.is_contiguous() and not wide[0].is_contiguous()
    leaf = strided.clone(memory_format=torch.preserve_format).requires_grad_()
    out = ops.multiscale_quantize(leaf, wide, **options, backend="native")
    assert torch.equal(out.indices, expected.indices) and same_bits(out.quantized, expected.quantized)
    assert out.quantized.is_contiguous()
    (grad,) = torch.autograd.grad(out.quantized.movedim(1, -1).square().sum(), leaf)
    other = features.clone().requires_grad_()
    (dense,) = torch.autograd.grad(
        ops.multiscale_quantize(other, codebooks, **options, backend="native").quantized.square().sum(), other
    )
    assert same_bits(grad, dense)
    ids = out.indices.T.contiguous().T
    args = {"scales": options["scales"], "size": (4, 7), "backend": "native"}
    assert same_bits(ops.multiscale_decode(ids, wide, **args), expected.quantized)
    assert same_bits(
        ops.multiscale_rows(strided, ids, wide, **options), ops.multiscale_rows(features, ids, codebooks, **options)
    )


@pytest.mark.parametrize("mode", ["cosine", "phi"])
def test_thread_counts_and_batches(mode):
    """No output depends on the thread count; ids and maps of an image not on its batch."""
    features, codebooks, options = case("square", mode, batch=37)

    def call():
        inputs = leaves(features, *codebooks)
        out = ops.multiscale_quantize(inputs[0], inputs[1:], **options, backend="native")
        decoded = ops.multiscale_decode(out.indices, inputs[1:], **decoding(options, 5), backend="native")
        grads = torch.autograd.grad(out.quantized.square().sum() + out.loss + decoded.square().sum(), inputs)
        rows = ops.multiscale_rows(features, out.indices, codebooks, **options, backend="native")
        return [*out, decoded, *grads, rows]

    one, *more = with_threads((1, 2, 3, 8, 64), call)
    for other in more:
        assert all(same_bits(a, b) for a, b in zip(one, other))
    for b in (0, 17, 36):
        alone = ops.multiscale_quantize(features[b : b + 1], codebooks, **options, backend="native")
        assert torch.equal(alone.indices[0], one[1][b]) and same_bits(alone.quantized[0], one[0][b])


PROBE = """
import hashlib, torch
from tokenflow_ext import build_info, ops
make = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
inputs = [make(3, 40, 8, 8), make(300, 32), make(300, 8), 0.1 * make(2, 40, 40, 3, 3), 0.1 * make(2, 40)]
for i in inputs: i.requires_grad_()
scales, digest = (1, 3, 8), hashlib.sha256()
for options in ({}, {"loss_on": "accumulated", "phi": (*inputs[3:], 0.5, [0, 1, 1])}):
    out = ops.multiscale_quantize(inputs[0], inputs[1:3], scales=scales, **options, backend="native")
    grads = torch.autograd.grad(out.quantized.square().sum() + out.loss, inputs, allow_unused=True)
    for t in (*out, *(g for g in grads if g is not None)):
        digest.update(t.detach().contiguous().view(torch.uint8 if t.dim() else t.dtype).numpy().tobytes())
print(build_info()["instruction_set"], digest.hexdigest())
"""


def test_instruction_sets_agree():
    """Every path that this processor can run gives the same bits, ids, maps, loss and gradients."""
    runs = {}
    for name in build_info()["instruction_sets"]:
        done = python(PROBE, TOKENFLOW_ISA=name)
        if done.returncode == 0:
            ran, digest = done.stdout.split()
            assert ran == name
            runs[name] = digest
        else:
            assert "the best of this processor" in done.stderr, done.stderr
    print(f"compared: {', '.join(runs)}")
    assert "baseline" in runs and build_info()["instruction_set"] in runs
    assert len(set(runs.values())) == 1, runs


def test_bad_input():
    x, tables = normal(2, 8, 4, 4), [normal(9, w) for w in WIDTHS]
    scales = (1, 2, 4)

    def quantize(error, argument, *args, **options):
        args = args or (x, tables)
        assert_sentence(
            error, "multiscale_quantize", argument, ops.multiscale_quantize, *args, **{"scales": scales, **options}
        )

    quantize(ValueError, "scales[2]", scales=(1, 2, 5))
    quantize(ValueError, "scales[0]", scales=((1, 0), 4))
    quantize(TypeError, "scales[1]", scales=(1, 2.5))
    quantize(ValueError, "scales", scales=())
    quantize(TypeError, "scales", scales=4)
    quantize(ValueError, "features", x[:, :7], tables)
    quantize(ValueError, "features", x[0], tables)
    quantize(TypeError, "features", x.long(), tables)
    quantize(TypeError, "codebooks", x, tables[0])
    quantize(ValueError, "codebooks[1]", x, [tables[0], tables[1][:5]])
    quantize(ValueError, "codebooks", x, [])
    quantize(ValueError, "metric", metric="euclid")
    quantize(ValueError, "weights", weights=[1.0])
    quantize(ValueError, "weights", weights=[1.0, -1.0])
    quantize(ValueError, "commitment_weight", commitment_weight=-1.0)
    quantize(ValueError, "loss_on", loss_on="maps")
    quantize(ValueError, "normalize_codes", metric="l2", normalize_codes=True)
    quantize(ValueError, "phi", phi=phi_of(scales))
    quantize(ValueError, "backend", backend="fast")
    accumulated = {"loss_on": "accumulated"}
    weight, bias, ratio, rows = phi_of(scales)
    quantize(TypeError, "phi", phi=(weight, bias), **accumulated)
    quantize(ValueError, "phi weight", phi=(weight[:, :7], bias, ratio, rows), **accumulated)
    quantize(ValueError, "phi bias", phi=(weight, bias[0], ratio, rows), **accumulated)
    quantize(ValueError, "phi assignment", phi=(weight, bias, ratio, [0, 1]), **accumulated)
    quantize(ValueError, "phi assignment", phi=(weight, bias, ratio, [0, 1, 2]), **accumulated)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_ids(backend):
    x, tables, scales = normal(2, 8, 4, 4), [normal(9, w) for w in WIDTHS], (1, 2, 4)
    ids = torch.zeros(2, 21, dtype=torch.int64)
    calls = {
        "multiscale_rows": lambda ids: ops.multiscale_rows(x, ids, tables, scales=scales, backend=backend),
        "multiscale_decode": lambda ids: ops.multiscale_decode(ids, tables, scales=scales, size=4, backend=backend),
        "multiscale_inputs": lambda ids: ops.multiscale_inputs(ids, tables, scales=scales, size=4, rule="accumulate", backend=backend),
    }  # fmt: skip
    chain = {"scales": scales, "size": 4, "rule": "chain", "backend": backend}
    for op, call in {**calls, "multiscale_inputs ": lambda ids: ops.multiscale_inputs(ids, tables, **chain)}.items():
        op = op.strip()
        for bad in (9, -2, 2**40):
            wrong = ids.clone()
            wrong[1, 7] = bad
            assert_sentence(ValueError, op, "indices", call, wrong)
        mixed = ids.clone()
        mixed[0, 2] = -1
        assert_sentence(ValueError, op, "indices", call, mixed)
        assert_sentence(TypeError, op, "indices", call, ids.int())
        assert_sentence(ValueError, op, "indices", call, ids[:, :20])
        assert_sentence(ValueError, op, "indices", call, ids[0])
    assert_sentence(ValueError, "multiscale_rows", "indices", calls["multiscale_rows"], ids[:1])
    for name in ("commitment_weight", "codebook_weight"):
        options = {"scales": scales, "backend": backend, name: -1.0}
        assert_sentence(ValueError, "multiscale_rows", name, ops.multiscale_rows, x, ids, tables, **options)
    assert_sentence(ValueError, "multiscale_rows", "indices", calls["multiscale_rows"], ids[:, :5])
    op, function = "multiscale_inputs", ops.multiscale_inputs
    assert_sentence(ValueError, op, "rule", function, ids, tables, scales=scales, size=4, rule="grow", backend=backend)
    assert_sentence(ValueError, op, "phi", function, ids, tables, phi=phi_of(scales), **chain)
    for refine in (0, 1, 4):
        assert_sentence(ValueError, op, "refine", function, ids, tables, refine=refine, **chain)
    assert_sentence(ValueError, op, "refine", function, ids[:, :1], tables, refine=2, **chain)
    assert_sentence(ValueError, op, "refine", function, ids, tables, refine=2, **{**chain, "rule": "accumulate"})
    assert_sentence(
        ValueError, "multiscale_decode", "scales[2]", ops.multiscale_decode, ids, tables, scales=scales, size=3
    )
    assert_sentence(TypeError, "multiscale_decode", "size", ops.multiscale_decode, ids, tables, scales=scales, size=4.0)
