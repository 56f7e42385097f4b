"""multiscale_decode and multiscale_inputs on the emulated kernels: the CPU kernels' bits, and what CUDA does with odd ids."""

import pytest
import test_multiscale_golden as golden
import torch
from harness import assert_near, normal, same_bits
from multiscale_cases import SCALES, WIDTHS

from tokenflow_ext import ops
from tokenflow_ext.ops._multiscale_decode import _tables

OPTIONS = {
    "cosine": {},
    "l2": {"metric": "l2"},
    "raw codes": {"normalize_codes": False},
    "phi shared": {"phi": 1},
    "phi partially shared": {"phi": 2},
    "phi per scale": {"phi": 9},
}
CALLS = {
    "decode": lambda ids, tables, **o: ops.multiscale_decode(ids, tables, **o),
    "accumulate": lambda ids, tables, **o: ops.multiscale_inputs(ids, tables, rule="accumulate", **o),
    "chain": lambda ids, tables, phi=None, **o: ops.multiscale_inputs(ids, tables, rule="chain", **o),
}


def cells(scale) -> int:
    return scale * scale if isinstance(scale, int) else scale[0] * scale[1]


def prefixes(scales) -> list[int]:
    """Lengths of every whole-scale prefix, the empty one first."""
    ends = [0]
    for scale in scales:
        ends.append(ends[-1] + cells(scale))
    return ends


def made(grid, options: str, batch: int = 3, widths=WIDTHS, codes: int = 37, dtype=torch.float32):
    """ids, tables and options; `grid` is a name of SCALES or (size, scales), phi P rows in turn."""
    size, scales = SCALES[grid] if isinstance(grid, str) else grid
    out = {"scales": scales, "size": size, **OPTIONS[options]}
    channels = sum(widths)
    if "phi" in out:
        rows = min(out["phi"], len(scales))
        weight = 0.1 * normal(rows, channels, channels, 3, 3, seed=9, dtype=dtype)
        bias = 0.1 * normal(rows, channels, seed=10, dtype=dtype)
        out["phi"] = weight, bias, 0.5, [s % rows for s in range(len(scales))]
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(codes, (batch, prefixes(scales)[-1]), generator=generator)
    return ids, [normal(codes, w, seed=2 + w, dtype=dtype) for w in widths], out


def check_bits(ids, tables, options, calls=CALLS, **more):
    """Both backends' values, which must be the same to the bit."""
    for name in calls:
        native, emulated = (CALLS[name](ids, tables, **options, **more, backend=b) for b in ("native", "emulated"))
        assert same_bits(native, emulated), name


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grid", SCALES)
def test_bits_of_the_cpu(grid, options, schedule):
    """Every prefix, both rules, every refined scale."""
    ids, tables, options = made(grid, options)
    for p, length in enumerate(prefixes(options["scales"])):
        check_bits(ids[:, :length], tables, options)
        for refine in range(2, p + 1):
            check_bits(ids[:, :length], tables, options, ["chain"], refine=refine)


@pytest.mark.parametrize("options", ["cosine", "l2", "phi partially shared"])
@pytest.mark.parametrize("grid", SCALES)
def test_twin(grid, options):
    ids, tables, single = made(grid, options)
    _, wide, options = made(grid, options, dtype=torch.float64)
    for call in CALLS.values():
        got, expected = call(ids, tables, **single, backend="emulated"), call(ids, wide, **options, backend="reference")
        assert_near(got, expected.float(), 2e-6)


@pytest.mark.parametrize(
    "grid, widths, batch, options",
    [
        (((3, 3), [1, (2, 3)]), (32, 8), 70, "cosine"),  # so many images that a block has eight channels
        (((3, 3), [1, 3]), (40, 32), 2, "cosine"),  # channels that eight do not divide are left over
        (((4, 5), [(3, 2), (4, 5)]), (41,), 9, "phi per scale"),
        (((61, 67), [2, (7, 5), (61, 67)]), (2, 1), 2, "cosine"),  # maps beyond shared memory
        (((61, 67), [2, (7, 5)]), (2, 1), 1, "phi shared"),
        (((1, 40), [(1, 33), (1, 2)]), (3,), 1, "l2"),
    ],
    ids=str,
)
def test_sizes(grid, widths, batch, options, core):
    ids, tables, options = made(grid, options, batch, widths)
    check_bits(ids, tables, options)
    assert len({launch[3] for launch in core.take_launches()}) > 1


@pytest.mark.parametrize("options", ["cosine", "phi shared"])
def test_empty_batch(options):
    ids, tables, options = made("square", options, batch=0)
    check_bits(ids, tables, options)


@pytest.mark.parametrize("options", OPTIONS)
def test_dropped_scales(options):
    """-1 for every id of a scale adds nothing, in that image alone."""
    ids, tables, options = made("any order, repeated, short of the map", options)
    ends = prefixes(options["scales"])
    for image, scale in ((0, 1), (1, 0), (1, 3)):
        ids[image, ends[scale] : ends[scale + 1]] = -1
    check_bits(ids, tables, options)
    ids[2] = -1
    check_bits(ids, tables, options)
    assert not ops.multiscale_decode(ids, tables, **options, backend="emulated")[2].any()


@pytest.mark.parametrize("outside", [-1, -7, 37, 2**40])
@pytest.mark.parametrize("options", ["cosine", "raw codes", "phi shared"])
def test_ids_outside_the_table(options, outside, core):
    """NaN rows in that image, counted; the CPU raises. -1 for a part of a scale is no dropped scale."""
    from tokenflow_ext.ops import _native

    ids, tables, options = made("square", options)
    clean = {name: call(ids, tables, **options, backend="emulated") for name, call in CALLS.items()}
    ids[1, 2], ids[1, 20] = outside, outside  # scales 2 and 4
    counts = _native.counts(-1)
    for name, call in CALLS.items():
        with pytest.raises(ValueError, match="indices: wanted ids in"):
            call(ids, tables, **options, backend="native")
        counts.zero_()
        got = call(ids, tables, **options, backend="emulated")
        assert counts.tolist() == [2, 0]
        assert got[1].isnan().any() and all(same_bits(got[b], clean[name][b]) for b in (0, 2))
    counts.zero_()


def test_tensors_among_others(core, guarded):
    """Views that begin anywhere, outputs beside which nothing is written."""
    ids, tables, options = made("oblong", "phi per scale")
    weight, bias, ratio, assignment = options["phi"]
    codebook, (height, width) = torch.cat(tables, dim=1), options["size"]
    grids = torch.tensor([[*s, p] for s, p in zip(options["scales"], assignment)])
    batch, length, channels = *ids.shape, codebook.shape[1]
    rows = length - cells(options["scales"][0])
    shapes = [(batch, channels, height, width), (batch, rows, channels), (*ids.shape, channels), (*ids.shape, 2)]
    outputs = [guarded(*shape, shift=1) for shape in shapes]
    inputs = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (ids, codebook, weight, bias)]
    core.multiscale_decode(
        *inputs[:2], _tables(list(WIDTHS), True), grids, height, width, *inputs[2:], ratio, *outputs, -1, 0, None
    )
    for got, name in zip(outputs, ("decode", "accumulate")):
        assert same_bits(got, CALLS[name](ids, tables, **options, backend="native"))


def test_launches(core):
    """Two for a decode without phi, however many scales; with phi four; two for the chain."""
    for options, name, expected in (
        ("cosine", "decode", ["prepare_kernel", "decode_kernel"]),
        ("cosine", "accumulate", ["prepare_kernel", "decode_kernel"]),
        ("phi shared", "decode", ["prepare_kernel", "upsample_kernel", "refine_kernel", "decode_kernel"]),
        ("cosine", "chain", ["growth_kernel", "chain_kernel"]),
    ):
        ids, tables, options = made("square", options)
        core.take_launches()
        CALLS[name](ids, tables, **options, backend="emulated")
        assert [launch[0].split("<")[0] for launch in core.take_launches()] == expected


def test_more_scales_than_a_launch_can_hold():
    ids, tables, options = made(((2, 2), [1] * 129), "cosine", batch=1)
    with pytest.raises(ValueError, match="at most 128 scales on CUDA"):
        ops.multiscale_decode(ids, tables, **options, backend="emulated")


@pytest.mark.parametrize("name", golden.CASES)
def test_golden_decode(name):
    golden.test_decode(name, "emulated")


@pytest.mark.parametrize("name, position", golden.CHAINS)
def test_golden_chain(name, position):
    golden.test_chain(name, position, "emulated")
