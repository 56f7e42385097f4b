"""The multi-scale backwards on the emulated kernels: autograd of the twins in float64, golden gradients, odd rows, edges."""

import os

import pytest
import test_multiscale_golden as golden
import torch
from harness import assert_gradients, leaves, normal, same_bits
from multiscale_cases import MODES, SCALES, case, phi_of

from cuda.test_multiscale_decode import CALLS, OPTIONS, made, prefixes
from tokenflow_ext import ops, reference

FULL = pytest.mark.skipif(os.environ.get("TOKENFLOW_CUDA_FULL") != "1", reason="long; `make test-cuda-full` runs it")


def with_leaves(tables, options):
    """Leaves of the tables and of phi, and the options with phi's in them."""
    inputs = leaves(*tables)
    if options.get("phi"):
        inputs += leaves(*options["phi"][:2])
        options = {**options, "phi": (*inputs[-2:], *options["phi"][2:])}
    return inputs, options


def gradients_of_ids(name: str, ids, tables, options, backend: str, **more):
    """Of the tables and, where the call has it, phi; the call's value is weighed with fixed numbers."""
    inputs, options = with_leaves(tables, options)
    if name == "chain":
        inputs = inputs[: len(tables)]
    out = CALLS[name](ids, inputs[: len(tables)], **options, **more, backend=backend)
    nothing = sum(0 * i.sum() for i in inputs)  # an empty prefix may depend on none of them
    return torch.autograd.grad((out * normal(*out.shape, seed=5, dtype=out.dtype)).sum() + nothing, inputs)


def check_ids(ids, single, wide, **more):
    (tables, options), (wide_tables, wide_options) = single, wide
    for name in CALLS:
        if "refine" in more and name != "chain":
            continue
        got = gradients_of_ids(name, ids, tables, options, "emulated", **more)
        assert_gradients(
            got, gradients_of_ids(name, ids, wide_tables, wide_options, "reference", **more), 2e-6, size=1e-3
        )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grid", SCALES)
def test_decode_and_inputs(grid, options):
    """Of no scale, the first and all of them; with the last one refined."""
    ids, *single = made(grid, options)
    _, *wide = made(grid, options, dtype=torch.float64)
    ends = prefixes(single[1]["scales"])
    for length in {0, ends[1], ends[-1]}:
        check_ids(ids[:, :length], single, wide)
    if len(ends) > 2:
        check_ids(ids, single, wide, refine=len(ends) - 1)


@pytest.mark.parametrize("options", ["cosine", "l2", "phi partially shared"])
def test_dropped_scales(options):
    ids, *single = made("any order, repeated, short of the map", options)
    _, *wide = made("any order, repeated, short of the map", options, dtype=torch.float64)
    ends = prefixes(single[1]["scales"])
    for image, scale in ((0, 1), (1, 0), (1, 3)):
        ids[image, ends[scale] : ends[scale + 1]] = -1
    check_ids(ids, single, wide)
    ids[2] = -1
    check_ids(ids, single, wide)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("options", ["cosine", "phi shared"])
def test_ids_outside_the_table_send_no_gradient(name, options):
    """As though their rows were not there; the other rows and phi keep finite gradients."""
    ids, tables, options = made("square", options)
    expected = gradients_of_ids(name, ids, tables, options, "emulated")
    one = (ids == ids[1, 2]).nonzero()
    for b, n in one.tolist():
        ids[b, n] = 1000
    got = gradients_of_ids(name, ids, tables, options, "emulated")
    code = int(made("square", "cosine")[0][1, 2])
    others = torch.arange(len(tables[0])) != code
    for g, e in zip(got[:2], expected[:2]):
        assert not g[code].any() and e[code].any() and same_bits(g[others], e[others])
    assert all(g.isfinite().all() for g in got[2:])


@pytest.mark.parametrize(
    "grid, widths, batch, options",
    [
        (((3, 3), [1, (2, 3)]), (32, 8), 40, "cosine"),
        (((4, 5), [(3, 2), (4, 5)]), (41,), 3, "phi per scale"),  # channels in two tiles of phi's gradient
        (((61, 67), [2, (7, 5)]), (2, 1), 2, "cosine"),  # maps beyond shared memory
        (((9, 37), [(2, 37), (9, 3)]), (2, 1), 2, "phi shared"),  # more rows and columns than a tile of it
        (((1, 3800), [(1, 3)]), (2,), 1, "l2"),  # lines beyond shared memory
        (((4, 4), [1, 4]), (8, 1, 1), 0, "phi shared"),
    ],
    ids=str,
)
def test_sizes(grid, widths, batch, options):
    ids, *single = made(grid, options, batch, widths)
    _, *wide = made(grid, options, batch, widths, dtype=torch.float64)
    check_ids(ids, single, wide)


def loop_gradients(function, features, tables, options, which: str, **more):
    """(result, gradients of features, tables and phi) of quantized, of the loss, or of both."""
    inputs, options = with_leaves([features, *tables], options)
    out = function(
        inputs[0], inputs[1 : 1 + len(tables)], **options, commitment_weight=0.3, codebook_weight=0.7, **more
    )
    seen = torch.where(out.quantized.isnan(), 0.0, out.quantized * normal(*out.quantized.shape, seed=5)).sum()
    value = {"quantized": seen, "loss": 3 * out.loss, "both": seen + 2 * out.loss}[which]
    grads = torch.autograd.grad(value, inputs, allow_unused=True)
    return out, [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs)]


def emulated(*arguments, **options):
    return ops.multiscale_quantize(*arguments, **options, backend="emulated")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", SCALES)
def test_loop(grid, mode):
    for which in ("quantized", "loss", "both"):
        out, got = loop_gradients(emulated, *case(grid, mode), which)
        twin, expected = loop_gradients(reference.multiscale_quantize, *case(grid, mode, torch.float64), which)
        assert torch.equal(out.indices, twin.indices)
        assert_gradients(got, expected, 3e-6)
        assert which != "quantized" or not any(g.any() for g in got[1:])


@pytest.mark.parametrize("rows", [1, 4])
def test_loop_with_phi_shared_or_per_scale(rows):
    for dtype, function in ((torch.float32, emulated), (torch.float64, reference.multiscale_quantize)):
        features, tables, options = case("square", "phi", dtype)
        weight, bias = (0.1 * normal(rows, *s, seed=3, dtype=dtype) for s in ((8, 8, 3, 3), (8,)))
        options["phi"] = weight, bias, 0.5, [s % rows for s in range(4)]
        out, grads = loop_gradients(function, features, tables, options, "both")
        if function is emulated:
            indices, got = out.indices, grads
    assert torch.equal(out.indices, indices)
    assert_gradients(got, grads, 3e-6)


def test_bits_do_not_depend_on_the_schedule(core):
    """No sum of a backward is in an order of its own."""
    import emulator

    results = []
    for schedule in emulator.SCHEDULES:
        emulator.configure(core, schedule, seed=3)
        results.append([])
        for mode in ("cosine", "phi"):
            results[-1] += loop_gradients(emulated, *case("square", mode, batch=5), "both")[1]
        ids, tables, options = made("square", "phi partially shared", batch=5)
        for name in CALLS:
            results[-1] += gradients_of_ids(name, ids, tables, options, "emulated")
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["cosine", "phi"])
def test_low_precision(mode, dtype):
    """Gradients are rounded once, to the features' type."""
    features, tables, options = case("oblong", mode)
    features = features.to(dtype)
    out, got = loop_gradients(emulated, features, tables, options, "loss")
    assert out.quantized.dtype == got[0].dtype == dtype
    _, expected = loop_gradients(emulated, features.float(), tables, options, "loss")
    assert same_bits(got[0], expected[0].to(dtype)) and all(same_bits(a, b) for a, b in zip(got[1:], expected[1:]))
    _, got = loop_gradients(emulated, features, tables, options, "both")
    _, expected = loop_gradients(emulated, features.float(), tables, options, "both")
    assert_gradients(got, expected, 2e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_values_that_are_not_numbers(mode, value):
    """What a bad pixel reaches gets and sends no gradient, as on the CPU; the other images are as they were."""
    features, tables, options = case("square", mode)
    features, scales = normal(3, 8, 16, 9, seed=1), [6, (16, 9)]
    options["scales"] = scales
    if "phi" in options:
        options["phi"] = phi_of(scales)
    features[0, 2, 1, 3] = value
    with pytest.warns(RuntimeWarning, match="rows hold NaN"):
        cpu, expected = loop_gradients(ops.multiscale_quantize, features, tables, options, "both", backend="native")
    out, got = loop_gradients(emulated, features, tables, options, "both")
    assert torch.equal(out.indices, cpu.indices) and torch.equal(out.quantized.isnan(), cpu.quantized.isnan())
    assert all(g.isfinite().all() for g in got)
    assert torch.equal(got[0][0] == 0, expected[0][0] == 0) and 0 < int((got[0][0] == 0).sum()) < got[0][0].numel()
    assert_gradients(got, expected, 3e-6)


@pytest.mark.parametrize("mode", ["cosine", "accumulated", "phi"])
def test_only_what_is_asked_for(mode):
    features, tables, options = case("square", mode)
    _, expected = loop_gradients(emulated, features, tables, options, "both")
    for wanted in range(len(expected)):
        inputs, made_options = with_leaves([features, *tables], options)
        for i, x in enumerate(inputs):
            x.requires_grad_(i == wanted)
        out = emulated(inputs[0], inputs[1:3], **made_options, commitment_weight=0.3, codebook_weight=0.7)
        value = (out.quantized * normal(*out.quantized.shape, seed=5)).sum() + 2 * out.loss
        (got,) = torch.autograd.grad(value, inputs[wanted])
        assert same_bits(got, expected[wanted])


@pytest.mark.parametrize("mode", ["cosine", "phi"])
@pytest.mark.parametrize("batch", [0, 1])
def test_few_images(mode, batch):
    features, tables, options = case("square", mode, batch=batch)
    _, got = loop_gradients(emulated, features, tables, options, "both")
    _, expected = loop_gradients(ops.multiscale_quantize, features, tables, options, "both", backend="native")
    assert_gradients(got, expected, 3e-6)


def test_gradients_of_a_slice():
    """A gradient that begins anywhere, features that lie among others, as views give them."""
    features, tables, options = case("square", "cosine", batch=4)
    whole = features.clone().requires_grad_()
    out = emulated(whole[1:], tables, **options)
    (got,) = torch.autograd.grad(out.quantized.movedim(1, -1)[..., 1:].square().sum(), whole)
    alone = features[1:].clone().requires_grad_()
    out = emulated(alone, tables, **options)
    (expected,) = torch.autograd.grad(out.quantized[:, 1:].square().sum(), alone)
    assert same_bits(got[1:], expected) and not got[0].any()


@pytest.mark.parametrize("mode", ["accumulated", pytest.param("phi", marks=FULL)])
def test_more_images_than_stay_in_the_cache(mode, core):
    """Stacks are made for half the images at a time; sums go on from one half to the other."""
    features, tables = normal(10, 32, 64, 64, seed=1), [normal(5, 32, seed=2)]
    options = {**case("square", mode)[2], "scales": [1, (2, 3)]}
    if mode == "phi":
        options["phi"] = 0.03 * normal(2, 32, 32, 3, 3, seed=4), 0.1 * normal(2, 32, seed=5), 0.5, [0, 1]
    core.take_launches()
    out, got = loop_gradients(emulated, features, tables, options, "both")
    names = [launch[0].split("<")[0] for launch in core.take_launches()]
    assert names.count("maps_gradient_kernel") == 2 and names.count("kernel_sum_kernel") == (mode == "phi")
    cpu, expected = loop_gradients(ops.multiscale_quantize, features, tables, options, "both", backend="native")
    assert torch.equal(out.indices, cpu.indices)
    assert_gradients(got, expected, 1e-5)


def test_launches(core):
    """Three and the sums by code for the loss on codes; without phi four for accumulated maps, with it seven and two sums."""
    for mode, expected in (
        ("cosine", ["prepare_kernel", "up_transposed_kernel", "features_gradient_kernel"]),
        ("accumulated", ["prepare_kernel", "upsample_kernel", "maps_gradient_kernel", "up_transposed_kernel"]),
        ("phi", ["prepare_kernel", "upsample_kernel", "refine_kernel", "maps_gradient_kernel", "kernel_gradient_kernel",
                 "refine_kernel", "up_transposed_kernel", "kernel_sum_kernel"]),
    ):  # fmt: skip
        inputs, options = with_leaves([case("square", mode)[0], *case("square", mode)[1]], case("square", mode)[2])
        out = emulated(inputs[0], inputs[1:3], **options)
        core.take_launches()
        torch.autograd.grad(out.loss, inputs)
        names = [launch[0].split("<")[0] for launch in core.take_launches()]
        assert names[: len(expected)] == expected, names
        assert names[-1] == "sum_kernel"


@pytest.mark.parametrize("name", golden.CASES)
def test_golden_gradients(name):
    golden.test_loop_gradients(name, "emulated")
