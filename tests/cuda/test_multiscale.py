"""multiscale_quantize and multiscale_rows on the emulated kernels: the CPU kernels' bits, launches, and odd values.

The loss adds the same numbers in another order, in float64: it may differ in its last bit.
"""

import warnings

import pytest
import torch
from golden_values import Case, case_names
from harness import assert_near, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from multiscale_cases import MODES, SCALES, WIDTHS, case, phi_of
from test_var_golden import options as var_options

from tokenflow_ext import ops
from tokenflow_ext.ops import _native
from tokenflow_ext.ops.multiscale import quantize_with_rows
from tokenflow_ext.ops.search import tables_of

NINE = [1, 2, 4, 6, 8, 10, 12, 14, 16]
REST = {
    "metric": "cosine", "weights": None, "phi": None, "commitment_weight": 0.25, "codebook_weight": 1.0, "loss_on": "codes",
    "normalize_codes": None,
}  # fmt: skip


def loop(features, codebooks, backend: str, **options):
    """(quantized, ids, loss, rows [B, L, C] that were searched), without the CPU's warning about rows that are not finite."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rows hold NaN", RuntimeWarning)
        out, rows = quantize_with_rows(features, codebooks, **{**REST, **options}, backend=backend)
    return *out, rows


def same_values(a, b) -> bool:
    """The same bits; NaN in the same places, whatever their sign."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(), b.nan_to_num())


def check(features, codebooks, **options):
    """The emulated loop, after every output was compared with the CPU's."""
    emulated, native = (loop(features, codebooks, backend, **options) for backend in ("emulated", "native"))
    assert torch.equal(emulated[1], native[1]), "ids"
    assert same_values(emulated[3], native[3]), "rows"
    assert same_values(emulated[0], native[0]), "quantized"
    assert_near(emulated[2], native[2], 1.2e-7, "loss")
    return emulated


def check_rows(features, ids, codebooks, **options):
    """multiscale_rows and its gradient: all bits are the CPU's."""
    results = []
    for backend in ("native", "emulated"):
        x = features.detach().clone().requires_grad_()
        rows = ops.multiscale_rows(x, ids, codebooks, **options, backend=backend)
        (grad,) = torch.autograd.grad(rows, x, normal(*rows.shape, seed=6))
        results.append((rows.detach(), grad))
    assert same_values(results[0][0], results[1][0]), "rows"
    assert same_bits(results[0][1], results[1][1]), "gradient"
    return results[1]


def names(core) -> list[str]:
    """The kernels launched since this was asked last."""
    return [launch[0].split("(")[0].split("<")[0].split("::")[-1] for launch in core.take_launches()]


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", SCALES)
def test_bits_of_the_cpu(grid, mode, batch):
    features, codebooks, options = case(grid, mode, batch=batch)
    _, ids, _, rows = check(features, codebooks, **options)
    assert same_bits(check_rows(features, ids, codebooks, **options)[0], rows)


@pytest.mark.parametrize("mode", ["weighted cosine", "accumulated", "phi"])
def test_every_schedule(mode, schedule):
    features, codebooks, options = case("any order, repeated, short of the map", mode, batch=2)
    features[0, 1, 2, 3] = torch.nan
    ids = check(features, codebooks, **options)[1]
    ids[1, :9] = -1
    check_rows(features, ids, codebooks, **options)
    _native.counts(-1).zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokenflow(dtype):
    """Nine scales and 32 + 8 channels, features in each type, a slice of a larger batch."""
    features = normal(3, 40, 16, 16, seed=1).to(dtype)[1:]
    codebooks = [normal(700, 32, seed=2), normal(700, 8, seed=3)]
    out = check(features, codebooks, scales=NINE)
    assert out[0].dtype == dtype and out[1].unique().numel() > 300
    check_rows(features, out[1], codebooks, scales=NINE)


@pytest.mark.parametrize("assignment", [[0] * 10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3], list(range(10))])
def test_var(assignment):
    """Ten scales, 32 channels, phi shared, partially shared, one a scale; raw codes for unit rows."""
    rows = max(assignment) + 1
    phi = 0.05 * normal(rows, 32, 32, 3, 3, seed=4), 0.1 * normal(rows, 32, seed=5), 0.5, assignment
    options = {"scales": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], "phi": phi, "loss_on": "accumulated"}
    features, codebooks = normal(1, 32, 16, 16, seed=1), [normal(300, 32, seed=2)]
    for more in ({"metric": "l2"}, {"normalize_codes": False}):
        ids = check(features, codebooks, **options, **more)[1]
        check_rows(features, ids, codebooks, **options, **more)


@pytest.mark.parametrize("name", [n for n in case_names("tokenflow_multiscale") if "k32768" not in n])
def test_published_loop(name):
    case = Case("tokenflow_multiscale", name)
    options = {"scales": case.options["scales_used"], "weights": case.options["weights"]}
    options["commitment_weight"] = case.options["beta"]
    quantized, ids, loss, _ = check(case["h"], [case["sem_table"], case["pix_table"]], **options)
    assert case.check_indices(ids) == 0
    case.check("f_hat", quantized, case["f_hat"])
    assert abs(loss.item() - case.scalars["vq_loss"] - case.scalars["commit_loss"]) <= case.limit("value")


@pytest.mark.parametrize("name", case_names("var_quantizer"))
def test_published_var(name):
    case = Case("var_quantizer", name)
    leaves, common, _ = var_options(case)
    with torch.no_grad():
        quantized, ids, loss, _ = check(
            case["f"], leaves[:1], **common, commitment_weight=case.options["beta"], loss_on="accumulated"
        )
    assert case.check_indices(ids) == 0
    case.check("f_hat", quantized, case["f_hat"])
    assert abs(loss.item() - case.scalars["loss"]) <= case.limit("f_hat")


@pytest.mark.parametrize(
    ("size", "scales", "widths", "batch", "mode"),
    [
        ((3, 3), [1, (2, 3)], (32, 8), 70, "cosine"),  # so many images that a block has eight channels
        ((3, 3), [1, 3], (40, 32), 70, "accumulated"),  # channels that eight divide, some that it does not
        ((4, 5), [(3, 2), (4, 5)], (41,), 9, "accumulated"),
        ((61, 67), [2, (7, 5), (61, 67)], (2, 1), 2, "accumulated"),  # maps beyond shared memory
        ((61, 67), [2, (7, 5)], (3,), 1, "phi"),
        ((1, 300), [(1, 33), (1, 2), (1, 300)], (3,), 1, "cosine"),  # rows longer than a block
        ((300, 1), [(33, 1), (2, 1), (300, 1)], (3,), 1, "phi"),
        ((17, 2), [(17, 1), (1, 2), (5, 2), (5, 2), 1], (2, 2, 2), 5, "l2"),
        ((2, 2), [2, 1], (570, 5), 2, "cosine"),  # rows too wide for the search's shared memory
    ],
    ids=str,
)
def test_sizes(size, scales, widths, batch, mode):
    channels = sum(widths)
    options = {**MODES[mode], "scales": scales}
    if options.get("phi"):
        weight, bias = 0.1 * normal(2, channels, channels, 3, 3, seed=4), 0.1 * normal(2, channels, seed=5)
        options["phi"] = weight, bias, 0.25, [s % 2 for s in range(len(scales))]
    features, codebooks = normal(batch, channels, *size, seed=1), [normal(19, w, seed=2 + w) for w in widths]
    ids = check(features, codebooks, **options)[1]
    check_rows(features, ids, codebooks, **options)


grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=grids, scales=st.lists(grids, min_size=1, max_size=5), batch=st.integers(0, 4), codes=st.integers(1, 200),
    mode=st.sampled_from(sorted(MODES)), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_scales(size, scales, batch, codes, mode, seed, dtype):
    """In any order, with repeats, none as large as the map needs to be there."""
    scales = [(min(h, size[0]), min(w, size[1])) for h, w in scales]
    options = {**MODES[mode], "scales": scales}
    if options.get("phi"):
        options["phi"] = phi_of(scales, seed=seed)
    features = normal(batch, sum(WIDTHS), *size, seed=seed).to(dtype)
    codebooks = [normal(codes, w, seed=seed + w) for w in WIDTHS]
    ids = check(features, codebooks, **options)[1]
    check_rows(features, ids, codebooks, **options)


@pytest.mark.parametrize("grid", SCALES)
@pytest.mark.parametrize("mode", MODES)
def test_launches(mode, grid, core):
    """Two a scale and five; with phi, two more a scale but no rows after the last; one where the maps have the loss."""
    features, codebooks, options = case(grid, mode)
    scales, phi, accumulated = len(options["scales"]), "phi" in options, options.get("loss_on") == "accumulated"
    core.take_launches()
    ids = loop(features, codebooks, "emulated", **options)[1]
    launched = names(core)
    step = ["search_kernel", "step_kernel"] + phi * ["refine_kernel", "pool_kernel"]
    expected = ["prepare_kernel", "pack_kernel", "pool_kernel", *scales * step]
    expected[-1:] = expected[-1:] * (not phi)
    expected += accumulated * ["map_error_kernel"] + ["finish_kernel", "loss_kernel"]
    assert launched == expected and len(launched) == (4 if phi else 2) * scales + 5 + accumulated - phi
    check_rows(features, ids, codebooks, **options)
    launched = names(core)
    step = ["step_kernel"] + phi * ["refine_kernel", "pool_kernel"]
    assert launched[-1] == "rows_backward_kernel" and launched.count("rows_backward_kernel") == 1
    assert launched[:-1] == ["prepare_kernel", "pool_kernel", *(scales - 1) * step, "step_kernel"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_finite(mode, value):
    """Id 0, NaN codes, no part in the loss; counted, not warned about; the other images do not notice."""
    features, codebooks, options = case("square", mode)
    features = normal(3, 8, 16, 9, seed=1)
    options["scales"] = [(3, 2), 6, (16, 9)]
    if "phi" in options:
        options["phi"] = phi_of(options["scales"])
    clean = check(features, codebooks, **options)
    features[1, 2, 1, 3] = value
    _native.counts(-1).zero_()
    quantized, ids, loss, rows = check(features, codebooks, **options)
    bad = rows.isnan().all(-1)
    assert _native.counts(-1).tolist() == [0, int(bad.sum())] and bad[1].any() and not bad[::2].any()
    assert torch.equal(rows.isnan().any(-1), bad) and not ids[bad].any() and loss.isfinite()
    assert quantized[1].isnan().any() and all(same_bits(quantized[b], clean[0][b]) for b in (0, 2))
    check_rows(features, ids, codebooks, **options)
    _native.counts(-1).zero_()


def test_numbers_of_any_size():
    """Rows that are zero, tiny, huge; a map whose step overflows in one channel is left out of its own loss alone."""
    for scale in (0.0, 1e-30, 1e-20, 1e18, 3e38):
        features = (normal(2, 8, 4, 4, seed=1) * scale).clamp(-3e38, 3e38)
        for mode in ("cosine", "l2", "accumulated"):
            _, codebooks, options = case("square", mode)
            check(features, codebooks, **{**options, "scales": [1, 3, 4]})
    codebooks = [torch.tensor([[3e38, 1.0], [3e38, 0.5]])]
    features = torch.full((1, 2, 2, 2), -3e38)
    features[:, 1] = torch.tensor([[0.1, 0.2], [0.9, 1.0]])
    out = check(features, codebooks, scales=[1, 2], metric="dot", loss_on="accumulated")
    assert out[3].isfinite().all(-1)[0, 0] and not out[3].isfinite().all()
    _native.counts(-1).zero_()


def test_codes_that_are_not_finite():
    """A code with NaN is chosen only where all have one, and takes its rows out of the loss."""
    features, codebooks, options = case("square", "l2")
    for bad in ([0], list(range(36)), list(range(37))):
        for table, column in ((0, 0), (0, 3), (1, 0)):
            broken = [c.clone() for c in codebooks]
            broken[table][bad, column] = torch.nan
            emulated, native = (loop(features, broken, b, **options) for b in ("emulated", "native"))
            assert torch.equal(emulated[1], native[1]) and same_values(emulated[0], native[0])
            assert (len(bad) == 37) == (not emulated[0].isfinite().all())
            assert_near(emulated[2], native[2], 1.2e-7)
    _native.counts(-1).zero_()


@pytest.mark.parametrize("options", ["cosine", "raw codes", "phi"])
def test_ids_outside_the_table(options):
    """A NaN code in that image, counted; the CPU raises. -1 for a part of a scale is no dropped scale."""
    features, codebooks, options = case("square", options)
    ids = loop(features, codebooks, "native", **options)[1]
    clean = ops.multiscale_rows(features, ids, codebooks, **options, backend="emulated")
    counts = _native.counts(-1)
    for outside in (-1, -7, 37, 2**40):
        ids[1, 2] = outside
        with pytest.raises(ValueError, match="indices: wanted ids in"):
            ops.multiscale_rows(features, ids, codebooks, **options, backend="native")
        counts.zero_()
        rows = ops.multiscale_rows(features, ids, codebooks, **options, backend="emulated")
        assert counts.tolist() == [1, 0]
        assert same_bits(rows[1, :5], clean[1, :5]) and rows[1, 5:].isnan().any()
        assert same_bits(rows[::2], clean[::2])
    counts.zero_()


@pytest.mark.parametrize("mode", MODES)
def test_dropped_scales(mode):
    """-1 for every id of a scale: zero rows, the map stays, no gradient passes, in that image alone."""
    features, codebooks, options = case("any order, repeated, short of the map", mode)
    ids = loop(features, codebooks, "native", **options)[1]
    for image, first, last in ((0, 0, 9), (1, 9, 13), (1, 22, 26)):
        ids[image, first:last] = -1
    rows, _ = check_rows(features, ids, codebooks, **options)
    assert not rows[ids == -1].any()
    ids[2] = -1
    _, grad = check_rows(features, ids, codebooks, **options)
    assert not grad[2].any() and grad[0].any()
    assert _native.counts(-1).tolist() == [0, 0]


def written(guarded, core, features, codebook, tables, scales, phi, accumulated, *, keep: bool):
    """What multiscale_quantize writes, amid guards and off its alignment."""
    batch, channels = features.shape[:2]
    length = sum(h * w for h, w, _ in scales)
    outputs = [
        guarded(*features.shape, dtype=features.dtype, shift=1),
        guarded(batch, length, dtype=torch.int64, shift=1),
        guarded(shift=1),
    ]
    widths = [channels, channels, len(tables[0])]
    outputs += [guarded(batch, length, width, shift=1) if keep else None for width in widths]
    grids = torch.tensor(scales)
    core.multiscale_quantize(features, codebook, tables, grids, *phi, accumulated, 1.25, *outputs, -1, 0, None)
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("with_phi", [False, True])
def test_everything_the_kernels_write(with_phi, metric, dtype, core, guarded):
    """Slices [1:] in, outputs amid guards; what is kept agrees with the codes; without it the rest is the same."""
    features, codebook = normal(3, 8, 5, 4, seed=1).to(dtype)[1:], normal(38, 8, seed=2)[1:]
    weight, bias = normal(3, 8, 8, 3, 3, seed=4)[1:] * 0.1, normal(3, 8, seed=5)[1:]
    phi = (weight, bias, 0.5) if with_phi else (None, None, 0.0)
    scales, tables = [(1, 1, 0), (2, 3, 1), (5, 4, 0), (3, 3, 1)], tables_of([5, 3], [1.0, 0.5], metric)
    arguments = features, codebook, tables, scales, phi, with_phi
    quantized, ids, loss, rows, codes, norms = written(guarded, core, *arguments, keep=True)
    options = {"scales": [s[:2] for s in scales], "metric": metric, "weights": [1.0, 0.5]}
    if with_phi:
        options.update(phi=(weight, bias, 0.5, [s[2] for s in scales]), loss_on="accumulated")
    tables_apart = [codebook[:, :5].contiguous(), codebook[:, 5:].contiguous()]
    native = loop(features, tables_apart, "native", **options)
    assert same_bits(quantized, native[0]) and torch.equal(ids, native[1]) and same_bits(rows, native[3])
    assert_near(loss, native[2], 1.2e-7)
    unit = metric == "cosine"
    if unit:
        expected = torch.stack([t[ids].double().norm(dim=-1) for t in tables_apart], -1)
        assert_near(norms, expected, 1e-6)
        assert same_bits(codes, codebook[ids] / norms.repeat_interleave(torch.tensor([5, 3]), -1))
    else:
        assert same_bits(codes, codebook[ids])
    few = written(guarded, core, *arguments, keep=False)
    assert same_bits(few[0], quantized) and torch.equal(few[1], ids) and same_bits(few[2], loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_the_rows_write(dtype, core, guarded):
    features, codebook = normal(3, 8, 5, 4, seed=1).to(dtype)[1:], normal(38, 8, seed=2)[1:]
    grids, tables = torch.tensor([(1, 1, 0), (2, 3, 0), (5, 4, 0)]), tables_of([5, 3], [1.0, 1.0], "cosine")
    ids = torch.arange(3 * 27).reshape(3, 27)[1:] % 37
    rows, kept = guarded(2, 27, 8, shift=1), guarded(2, 27, shift=1)
    core.multiscale_rows(features, ids, codebook, tables, grids, None, None, 0.0, rows, kept, -1, 0, None)
    grad_rows, grad = normal(3, 27, 8, seed=3)[1:], guarded(2, 8, 5, 4, dtype=dtype, shift=1)
    core.multiscale_rows_backward(kept, grad_rows, grids, grad, -1, 0, None)
    x = features.clone().requires_grad_()
    apart = [codebook[:, :5].contiguous(), codebook[:, 5:].contiguous()]
    native = ops.multiscale_rows(x, ids, apart, scales=[1, (2, 3), (5, 4)], backend="native")
    assert same_bits(rows, native.detach()) and (kept == 1).all()
    assert same_bits(grad, torch.autograd.grad(native, x, grad_rows)[0])


def test_what_is_refused(core, guarded):
    features, codebook, tables = normal(1, 8, 2, 2, seed=1), normal(9, 8, seed=2), tables_of([8], [1.0], "l2")
    none = None, None, 0.0
    sentences = [
        (features.double(), codebook, [(1, 1, 0)], "multiscale_quantize: features: wanted .*float32"),
        (features, codebook.double(), [(1, 1, 0)], "multiscale: codebook: wanted contiguous float32"),
        (features, codebook, [(3, 1, 0)], "multiscale: grids: wanted grids that fit the map"),
        (features, codebook, [(1, 1, 0)] * 129, "multiscale: grids: .*at most 128 scales on CUDA"),
    ]
    for x, codes, scales, sentence in sentences:
        with pytest.raises(ValueError, match=sentence):
            written(guarded, core, x, codes, tables, scales, none, False, keep=False)
    check(features, [codebook], scales=[1] * 128, metric="l2")
    check_rows(features, torch.zeros(1, 128, dtype=torch.int64), [codebook], scales=[1] * 128, metric="l2")
