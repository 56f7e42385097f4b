"""The certified search on CUDA, emulated: the float32 searches' ids and scores, bit for bit, and it is the search that ran.

What it rests on, the bound, is attacked by tests/certified/bound_cuda.cpp, term by term.
"""

import warnings

import emulator
import pytest
import torch
from emulator.programs import ROOT, build, run
from harness import METRICS, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from multiscale_cases import MODES, case
from test_certified_search import adversaries

from tokenflow_ext import ops, search_precision, trace


def same(x, codebook, **options):
    """What was traced, after comparing ids and scores with those of the CPU and of the float32 search."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with search_precision("full"):
            wanted = [
                ops.nearest_code(x, codebook, return_scores=True, **options, backend=backend)
                for backend in ("native", "emulated")
            ]
        with search_precision("certified"), trace() as searched:
            got = ops.nearest_code(x, codebook, return_scores=True, **options, backend="emulated")
    for ids, scores in wanted:
        assert torch.equal(got[0], ids)
        assert same_bits(got[1].nan_to_num(nan=7e37), scores.nan_to_num(nan=7e37))
    assert searched.int8 == 0 and searched.full == searched.fallback
    assert searched.bf16 + searched.full == x.shape[:-1].numel()
    return searched


def kernels(core) -> list[str]:
    return [launch[0] for launch in core.take_launches()]


SHAPES = [
    *((rows, codes, 8, 1) for rows in (0, 1, 33) for codes in (1, 31, 63, 64, 65, 4097)),
    *((33, 700, width, 1) for width in (1, 15, 16, 17, 32, 40, 72, 257)),
    (130, 300, 33, 1),
    (150, 130, 5, 3),
    (70, 200, 321, 2),
    (3, 700, 656, 1),
]
"""Rows, codes, width, groups: both heights of tiles, one and several ranges, whole and partial segments and steps."""


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "codes", "width", "groups"), SHAPES)
def test_ids_and_scores_have_the_bits_of_float32(core, rows, codes, width, groups, metric):
    x, codebook = normal(rows, groups, width, seed=1), normal(groups, codes, width, seed=2)
    if codes > 4:
        codebook[:, codes // 2] = codebook[:, codes - 1] = codebook[:, 0]
    if codes > 64:
        codebook[:, 3, 0], codebook[:, 5] = torch.inf, torch.nan
    if rows > 4:
        x[0], x[1], x[2, 0, 0], x[3, 0, width - 1] = codebook[0, 0], 0, torch.nan, -torch.inf
    same(x, codebook, metric=metric)
    assert any("certified_kernel" in kernel for kernel in kernels(core)) == (rows > 0)
    if codes > 64:
        same(x, codebook, metric=metric, window=(3, codes - 2))


def test_which_kernels_run(core):
    """float32 by default, whatever "auto" does on the CPU; further places and wide rows take the float32 way."""

    def ran(width=8, rows=40, **options):
        ops.nearest_code(normal(rows, width, seed=1), normal(300, width, seed=2), **options, backend="emulated")
        return [kernel for kernel in kernels(core) if kernel != "pack_kernel"]

    assert ran() == ["search_kernel<32, true>", "unpack_kernel"]
    with search_precision("full"):
        assert ran() == ["search_kernel<32, true>", "unpack_kernel"]
    rounds = ["round_kernel", "round_kernel"]
    with search_precision("certified"):
        once = [*rounds, "certified_kernel<1>", "resolve_kernel", "search_kernel<128, true>", "unpack_kernel"]
        assert ran() == once
        assert ran(rows=65)[2] == "certified_kernel<2>" and ran(rows=65, width=321)[2] == "certified_kernel<1>"
        assert ran(topk=2) == [*once, "search_kernel<32, true>", "unpack_kernel"]
        assert ran(width=657) == ["search_kernel<32, false>", "unpack_kernel"]
    assert ran() == ["search_kernel<32, true>", "unpack_kernel"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [8, 32, 64])
def test_few_segments_are_scored_again(width, metric):
    """Of 64 segments of normal codes; a scan that lets everything survive is useless."""
    searched = same(normal(64, width, seed=1), normal(4096, width, seed=2), metric=metric)
    share = searched.rescored / (64 * 64)
    print(f"{metric}, {width} channels: {100 * share:.2f} % of the segments")
    assert searched.bf16 == 64 and searched.fallback == 0 and 1 / 64 <= share < (0.025 if width == 32 else 0.05)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", list(adversaries(16)))
def test_adversaries(name, metric):
    x, codebook = adversaries(16)[name]
    searched = same(x[:100], codebook, metric=metric)
    print(f"{name}, {metric}: {searched}")
    if (name, metric) in (("collapsed codes", "l2"), ("codes one rounding apart", "l2"), ("overflowing", "l2")):
        assert searched.fallback > 0
    if name in ("rows on codes", "integers", "rows over ten decades") and metric == "l2":
        assert searched.fallback == 0


def test_clusters_and_what_their_codes_leave():
    """Codes near a few centres, rows near codes, and the residuals that a next scale would search: as training makes them."""
    centers = normal(40, 16, seed=1)
    codebook = centers[torch.arange(1000) % 40] + 0.2 * normal(1000, 16, seed=2)
    x = codebook[torch.arange(90) * 11] + 0.1 * normal(90, 16, seed=3)
    for metric in METRICS:
        searched = same(x, codebook, metric=metric)
        ids = ops.nearest_code(x, codebook, metric=metric)
        assert searched.fallback == 0
        same(x - codebook[ids], codebook, metric=metric)


def test_codes_that_do_not_exist_are_never_scored():
    """Rows on the codes of a table that ends within a segment: the one segment of each row, and no other."""
    codebook = normal(131, 16, seed=1)
    assert same(codebook[:100], codebook, metric="l2").rescored == 100


def test_some_tiles_alone_are_handed_over():
    """Of two groups the second has codes that nothing tells apart, but for the last one; of its rows the first 128 are far."""
    x, codebook = normal(300, 2, 8, seed=1), normal(2, 700, 8, seed=2)
    codebook[1] = codebook[1, :1]
    codebook[1, 699] *= 1 + 2.0**-20
    x[:128, 1] = torch.nan
    x[128:, 1] = codebook[1, 699]
    for metric in METRICS:
        searched = same(x, codebook, metric=metric)
        assert searched.fallback == 172 and searched.bf16 == 300 + 128
    swapped = same(x.flip(1), codebook.flip(0), metric="dot")
    assert swapped.fallback == 172
    assert (ops.nearest_code(x.nan_to_num(), codebook, metric="dot")[128:, 1] == 699).all()


def test_the_scan_alone_would_be_wrong():
    """Codes whose order bfloat16 turns around, at the edge of the bound: the best by the scan is the worst of the two."""
    width, codes = 32, 640
    x = torch.ones(50, width)
    x[:, ::2] += 0.99 * 2.0**-8  # becomes 1
    x[:, 1::2] += 1.01 * 2.0**-8  # becomes 1 + 2^-7
    best, rival = torch.zeros(width), torch.zeros(width)
    best[::2], rival[1::2] = 1, 1 - 2.0**-8
    codebook = -1e-4 * normal(codes, width, seed=1).abs()  # short: no other segment's bound covers for that of 600
    codebook[600], codebook[7] = best, rival
    rounded = x.bfloat16().float() @ codebook.bfloat16().float().T
    assert (rounded.argmax(-1) == 7).all()
    searched = same(x, codebook, metric="dot")
    assert (ops.nearest_code(x, codebook, metric="dot") == 600).all()
    assert searched.rescored == 2 * 50 and searched.fallback == 0


@pytest.mark.parametrize("cores", emulator.TENSOR_CORES)
def test_whatever_tensor_cores_do_to_the_last_bits(core, cores):
    emulator.configure(core, tensor_cores=cores)
    for width in (16, 200):
        x, codebook = normal(40, width, seed=1), normal(300, width, seed=2)
        codebook[100:] = codebook[:200] * (1 + 2.0**-20 * torch.arange(200)[:, None])
        for metric in METRICS:
            same(x, codebook, metric=metric)


def test_in_any_order(schedule):
    for rows, codes, width, groups in [(33, 900, 8, 2), (140, 1400, 40, 1)]:
        x, codebook = normal(rows, groups, width, seed=1), normal(groups, codes, width, seed=2)
        codebook[:, ::9] = codebook[:, :1]
        same(x, codebook, metric="l2")
    same(normal(140, 8, seed=1), normal(1, 8, seed=2).repeat(1400, 1), metric="l2")  # all ties


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_that_begin_anywhere(dtype):
    x, codebook = normal(40, 1, 9, seed=1), normal(1, 200, 9, seed=2)
    same(x.to(dtype)[1:], codebook[:, 1:], metric="cosine")
    same(x[1:, 0].to(dtype), codebook[0, 1:], metric="l2")


@pytest.mark.parametrize("weights", [None, (1.0, 0.25, 0.0), (1e-3, 50.0, 1.0)])
@pytest.mark.parametrize("metric", METRICS)
def test_shared_tables_and_quantize(metric, weights):
    xs, tables = [normal(50, w, seed=w) for w in (32, 8, 3)], [normal(300, w, seed=w + 1) for w in (32, 8, 3)]
    xs[0][3, 5] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = ops.shared_quantize(xs, tables, metric=metric, weights=weights, backend="emulated")
        with search_precision("certified"), trace() as searched:
            got = ops.shared_quantize(xs, tables, metric=metric, weights=weights, backend="emulated")
    assert searched.bf16 + searched.full == 50 and searched.bf16 > 0
    assert torch.equal(got.indices, wanted.indices) and torch.equal(got.loss, wanted.loss)
    for a, b in zip(got.quantized, wanted.quantized, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_multiscale(mode):
    features, codebooks, options = case("oblong", mode, batch=2)
    features[0, 1, 2, 3] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = ops.multiscale_quantize(features, codebooks, **options, backend="emulated")
        with search_precision("certified"), trace() as searched:
            got = ops.multiscale_quantize(features, codebooks, **options, backend="emulated")
    assert searched.bf16 + searched.full == got.indices.numel() and searched.bf16 > searched.full
    assert torch.equal(got.indices, wanted.indices) and torch.equal(got.loss, wanted.loss)
    torch.testing.assert_close(got.quantized, wanted.quantized, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 140),
    codes=st.integers(1, 300),
    width=st.integers(1, 40),
    metric=st.sampled_from(METRICS),
    scale=st.tuples(st.floats(-25, 18), st.floats(-25, 18)),
    cores=st.sampled_from(emulator.TENSOR_CORES),
    coarse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_scale(rows, codes, width, metric, scale, cores, coarse, seed):
    emulator.configure(emulator.core(), "threads", seed, tensor_cores=cores)
    x, codebook = normal(rows, width, seed=seed), normal(codes, width, seed=seed + 1)
    if coarse:  # many exact ties
        x, codebook = x.mul(2).round().div(2), codebook.mul(2).round().div(2)
    same(x * 10 ** scale[0], codebook * 10 ** scale[1], metric=metric)


COVERED = {"none"}
"""What must not fail: the bound itself."""


def test_the_bound_is_right_and_none_of_its_terms_can_be_left_out():
    cuda = ROOT / "csrc/cuda"
    parts = [cuda / f"{name}.cu" for name in ("search", "search_pack", "certified", "certified_pack")]
    program = build("bound", "plain", dict.fromkeys([*parts, ROOT / "tests/certified/bound_cuda.cpp"], ()))
    ran = run(program, "1")
    assert ran.code == 0, ran.text
    for line in ran.text.splitlines():
        print(line)
        term, factor, checks, failures, _ = line.split(",")
        assert int(checks) > 20000
        assert (int(failures) == 0) == (term in COVERED), f"the bound's {term} times {factor}: {failures} failures"


def test_the_precision_is_that_of_the_block(core):
    """It ends with the block, also after an error, and blocks nest."""
    with pytest.raises(ZeroDivisionError), search_precision("certified"):
        with search_precision("full"):
            assert not core.certify(False)
        assert core.certify(True)
        1 / 0
    assert not core.certify(False)
