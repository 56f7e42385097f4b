"""The certified 8-bit scan returns the float32 scan's ids and scores, bit for bit, and it is the scan that ran."""

import functools
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from harness import METRICS, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenflow_ext
from tokenflow_ext import ops, search_precision, trace

pytestmark = pytest.mark.skipif(
    tokenflow_ext.build_info()["certified_search"] == "none",
    reason="neither AVX2 nor AVX512-VNNI here, or a lower TOKENFLOW_ISA",
)


def both(x, codebook, metric="l2", **options):
    """The certified answer, after comparing its bits with the float32 scan's; and what the certified scan did."""
    with search_precision("full"):
        wanted = ops.nearest_code(x, codebook, metric=metric, return_scores=True, **options)
    with search_precision("certified"), trace() as searched:
        got = ops.nearest_code(x, codebook, metric=metric, return_scores=True, **options)
    assert searched.int8 + searched.full == x.shape[:-1].numel()
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=0, equal_nan=True)
    return got[0], searched


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [1, 2, 3, 8, 31, 32, 40, 72, 96, 97, 192, 193, 257, 300])
def test_widths(width, metric):
    x, codebook = normal(200, width, seed=1), normal(1500, width, seed=2)
    _, searched = both(x, codebook, metric)
    if 8 <= width <= 72:
        assert searched.int8 == 200
    if width > 72:
        assert searched.int8 > 0


def test_shapes_at_random():
    """Widths up to four chunks, codes about the edges of panels and blocks; nearly every row is the 8-bit scan's."""
    generator = torch.Generator().manual_seed(0)

    def whole(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows = scanned = 0
    for i in range(60):
        width, codes = whole(1, 300), max(1, 32 * whole(0, 70) + whole(-1, 1))
        count, metric = whole(65, 200), METRICS[i % len(METRICS)]
        x, codebook = normal(count, width, seed=i), normal(codes, width, seed=1000 + i)
        nearest = torch.randint(codes, (count,), generator=generator)
        _, searched = both(codebook[nearest] + 0.3 * x, codebook, metric)
        rows, scanned = rows + count, scanned + searched.int8
    print(f"{scanned} of {rows} rows in 8 bits")
    assert scanned > 0.9 * rows


@pytest.mark.parametrize("codes", [1, 2, 31, 33, 512, 1023, 1024, 1025, 4097])
@pytest.mark.parametrize("rows", [65, 128, 131])
def test_sizes(rows, codes):
    both(normal(rows, 9, seed=1), normal(codes, 9, seed=2), "cosine")


@pytest.mark.parametrize("metric", METRICS)
def test_groups_and_window(metric):
    x, codebook = normal(100, 3, 8, seed=1), normal(3, 700, 8, seed=2)
    both(x, codebook, metric)
    ids, _ = both(x, codebook, metric, window=(100, 613))
    assert ids.min() >= 100 and ids.max() < 613


@functools.cache
def adversaries(width):
    """Name -> (rows, codes): what an error bound is likely to get wrong."""
    torch.manual_seed(0)
    x, codes = normal(160, width, seed=1), normal(1200, width, seed=2)
    close, axes = codes[:1].repeat(1200, 1), torch.eye(width)
    return {
        "duplicated codes": (x, codes[torch.arange(1200) % 37]),
        "one code": (x, close),
        "codes one rounding apart": (x, close * (1 + 2.0**-23 * torch.arange(1200)[:, None])),
        "collapsed codes": (x, 1e-4 * codes + codes[0]),
        "collapsed codes, rows behind them": (
            -torch.linspace(0.01, 30, 160)[:, None] * close[:160],
            close + 1e-6 * codes,
        ),
        "uniform(-1/K, 1/K)": (x, (torch.rand(1200, width) * 2 - 1) / 1200),
        "one giant code": (x, torch.cat([codes, 1e6 * codes[:1]])),
        "norms over ten decades": (x, codes * 10 ** torch.linspace(-5, 5, 1200)[:, None]),
        "rows over ten decades": (x * 10 ** torch.linspace(-5, 5, 160)[:, None], codes),
        "channels over ten decades": (
            x * 10 ** torch.linspace(-5, 5, width),
            codes * 10 ** torch.linspace(5, -5, width),
        ),
        "huge": (x * 1e18, codes * 1e18),
        "overflowing": (x * 1e20, codes * 1e20),
        "denormal codes": (x, codes * 1e-40),
        "denormal rows": (x * 1e-40, codes),
        "all denormal": (x * 1e-40, codes * 1e-40),
        "one-hot": (axes[torch.arange(160) % width], axes[torch.arange(1200) % width]),
        "one-hot codes": (x, axes[torch.arange(1200) % width] * torch.arange(1, 1201)[:, None]),
        "zero rows": (x * (torch.arange(160) % 3 > 0)[:, None], codes),
        "zero codes": (x, codes * (torch.arange(1200) % 5 > 0)[:, None]),
        "all zero": (torch.zeros(160, width), torch.zeros(1200, width)),
        "rows on codes": (codes[torch.arange(160) * 7], codes),
        "rows between codes": ((codes[:160] + codes[160:320]) / 2, codes),
        "integers": (torch.randint(-3, 4, (160, width)).float(), torch.randint(-3, 4, (1200, width)).float()),
        "bfloat16 codes": (x, codes.bfloat16().float()),
        "signs": (x.sign(), codes.sign()),
        "NaN and inf rows": (x.index_fill(0, torch.tensor([3, 70]), float("nan")).clamp_max(2), codes),
        "an infinite row": (x.index_fill(0, torch.tensor([5]), float("inf")), codes),
        "a NaN code": (x, codes.index_fill(0, torch.tensor([11]), float("nan"))),
        "an infinite code": (x, codes.index_fill(0, torch.tensor([11]), float("inf"))),
        "far from the origin": (x + 1000, codes + 1000),
        "one channel": (x * axes[0], codes * axes[0]),
    }


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [16, 200])
@pytest.mark.parametrize("name", list(adversaries(16)))
def test_adversaries(name, width, metric):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        _, searched = both(*adversaries(width)[name], metric)
    print(f"{name}, {width}, {metric}: {searched}")
    if (name, metric) == ("collapsed codes", "l2"):
        assert searched.fallback, "the fallback was not exercised"
    if name in ("rows on codes", "zero rows") or (width == 16 and name in ("bfloat16 codes", "integers")):
        assert searched.int8 > searched.full


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 2200), st.integers(65, 150), st.sampled_from(METRICS), st.integers(0, 2**32),
    st.floats(-12, 12), st.floats(-12, 12), st.floats(0, 4), st.booleans(),
)  # fmt: skip
def test_any_scale_and_shape(width, codes, rows, metric, seed, row_scale, code_scale, spread, coarse):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        sizes = (spread * torch.randn(n, 1, generator=generator)).exp()
        return sizes * torch.randn(n, width, generator=generator)

    x, codebook = draw(rows) * 10**row_scale, draw(codes) * 10**code_scale
    if coarse:  # ties
        x, codebook = (x / x.abs().max() * 4).round(), (codebook / codebook.abs().max() * 4).round()
    both(x, codebook, metric)


@pytest.mark.parametrize("weights", [None, (1.0, 0.25), (0.0, 3.0), (1e-3, 50.0)])
@pytest.mark.parametrize("metric", METRICS)
def test_shared_tables(metric, weights):
    xs, tables = [normal(150, w, seed=w) for w in (32, 8)], [normal(900, w, seed=50 + w) for w in (32, 8)]
    with search_precision("full"):
        wanted = ops.shared_quantize(xs, tables, metric=metric, weights=weights)
    with search_precision("certified"), trace() as searched:
        got = ops.shared_quantize(xs, tables, metric=metric, weights=weights)
    assert searched.int8 >= 148
    assert torch.equal(got.indices, wanted.indices) and torch.equal(got.loss, wanted.loss)


def test_a_trained_codebook_and_its_residuals():
    """Codes that followed clustered data, residuals that shrink from scale to scale: what training makes of both."""
    torch.manual_seed(0)
    centers = torch.randn(300, 12)

    def draw():
        return (centers[torch.randint(300, (6, 8, 8))] + 0.2 * torch.randn(6, 8, 8, 12)).permute(0, 3, 1, 2)

    one = tokenflow_ext.quantize.VectorQuantizer(12, 1024, metric="l2", update="ema", decay=0.5, kmeans_init=True)
    several = tokenflow_ext.quantize.MultiScaleQuantizer(one, (1, 2, 4, 8)).train()
    for _ in range(12):
        several(draw())
    several.eval()
    x = draw()
    with search_precision("full"):
        wanted = several.encode(x)
    with search_precision("certified"), trace() as searched:
        got = several.encode(x)
    assert torch.equal(got, wanted)
    assert searched.int8 > 0.9 * wanted.numel(), searched
    rows = ops.multiscale_rows(x, wanted, one.codebooks(), scales=(1, 2, 4, 8), metric="l2")
    both(rows.reshape(-1, 12), one.codebooks()[0], "l2")


def test_which_scan_runs():
    x, codebook = normal(512, 8, seed=1), normal(2048, 8, seed=2)
    for precision, rows, dtype, path in (
        ("auto", 512, torch.float32, "int8"),
        ("full", 512, torch.float32, "full"),
        ("auto", 64, torch.float32, "full"),
        ("auto", 512, torch.float64, "full"),
        ("auto", 512, torch.bfloat16, "int8"),
    ):
        with search_precision(precision), trace() as searched:
            ops.nearest_code(x[:rows].to(dtype), codebook)
        assert getattr(searched, path) == rows and searched.int8 + searched.full == rows, (precision, rows, dtype)


def test_threads_agree():
    x, codebook = normal(700, 40, seed=1), normal(3000, 40, seed=2)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 8, 64):
        torch.set_num_threads(threads)
        results += [torch.cat([both(x[:n], codebook)[0] for n in (66, 130, 700)])]
    torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


ROOT = Path(__file__).parents[1]
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
COVERED = {"none", "ceiling", "packing"}
"""Terms whose work the others do as well, see docs/certified_search.md; "none" is the bound itself."""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_bound_is_right_and_none_of_its_terms_can_be_left_out(tmp_path):
    isa = tokenflow_ext.build_info()["instruction_set"]
    program = tmp_path / "bound"
    sources = [ROOT / "tests/certified/bound.cpp", ROOT / "csrc/cpu/search_state.cpp"]
    options = ["-std=c++17", "-O1", "-fopenmp", "-ffp-contract=off", "-w", f"-DTOKENFLOW_ISA={isa}", "-DTOKENFLOW_X86"]
    subprocess.run(["c++", *options, *FLAGS[isa], f"-I{ROOT / 'csrc'}", *sources, "-o", program], check=True)
    lines = subprocess.run([program, "1"], capture_output=True, text=True, check=True).stdout.splitlines()
    for line in lines:
        print(line)
        term, factor, checks, failures, _ = line.split(",")
        assert int(checks) > 20000
        if term == "none":
            assert int(failures) == 0
        elif term not in COVERED:
            assert int(failures) > 0, f"the bound's {term} times {factor} went unnoticed"


def test_words_for_bad_input():
    with pytest.raises(ValueError, match="precision: wanted one of auto, full, certified, got 'int4'"):
        with search_precision("int4"):
            pass
