"""nearest_code against its twin, the canonical score bit for bit, and the edges of api.md."""

import warnings

import numpy as np
import pytest
import torch
from harness import (
    FLOATS,
    METRICS,
    assert_near,
    assert_sentence,
    canonical_scores,
    compiled,
    exact_scores,
    group_near_ties,
    near_ties,
    normal,
    opcheck,
    same_bits,
    with_threads,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import ops, reference
from tokenflow_ext.ops import nearest_code

SHAPES = [
    (1, 1, 1),
    (5, 1, 3),
    (67, 33, 1),
    (130, 100, 8),
    (64, 32, 40),
    (321, 2500, 32),
    (77, 1031, 13),
    (3, 4096, 256),
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "codes", "width"), SHAPES)
def test_ids_of_the_twin(rows, codes, width, metric):
    x, codebook = normal(rows, width, seed=1), normal(codes, width, seed=2)
    found = nearest_code(x, codebook, metric=metric, backend="native")
    for dtype in (torch.float32, torch.float64):
        expected = reference.nearest_code(x.to(dtype), codebook.to(dtype), metric=metric)
        near_ties(found, expected, [x], [codebook], metric)


@pytest.mark.parametrize("metric", METRICS)
def test_groups(metric):
    x, codebook = normal(9, 7, 4, 8, seed=1), normal(4, 200, 8, seed=2)
    found = nearest_code(x, codebook, metric=metric, backend="native")
    assert found.shape == (9, 7, 4)
    group_near_ties(found, reference.nearest_code(x.double(), codebook.double(), metric=metric), x, codebook, metric)
    for g in range(4):
        assert torch.equal(found[..., g], nearest_code(x[..., g, :], codebook[g], metric=metric, backend="native"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "codes", "width"), [(3, 5, 1), (9, 33, 8), (6, 70, 40), (65, 31, 17)])
def test_canonical_bits(rows, codes, width, metric):
    """Every score has the bits of the fused multiply-add chain; ties go to the lowest id."""
    x, codebook = normal(rows, width, seed=3), normal(codes, width, seed=4)
    ids, scores = nearest_code(x, codebook, metric=metric, topk=codes, return_scores=True, backend="native")
    exact = canonical_scores([x], [codebook], metric)
    order = np.argsort(exact, axis=1, kind="stable")
    assert np.array_equal(ids.numpy(), order.reshape(ids.shape))
    assert np.array_equal(
        scores.numpy().view(np.int32), np.take_along_axis(exact, order, 1).reshape(ids.shape).view(np.int32)
    )
    assert np.array_equal(nearest_code(x, codebook, metric=metric, backend="native").numpy(), order[:, 0])


@pytest.mark.parametrize("codebook_type", FLOATS)
@pytest.mark.parametrize("x_type", FLOATS)
def test_float_types_are_upcast_exactly(x_type, codebook_type):
    x, codebook = normal(70, 8, seed=1, dtype=x_type), normal(300, 8, seed=2, dtype=codebook_type)
    found, scores = nearest_code(x, codebook, return_scores=True, backend="native")
    wide = torch.float64 if torch.float64 in (x_type, codebook_type) else torch.float32
    expected, expected_scores = nearest_code(x.to(wide), codebook.to(wide), return_scores=True, backend="native")
    assert torch.equal(found, expected) and same_bits(scores, expected_scores) and scores.dtype == wide
    near_ties(found, reference.nearest_code(x.double(), codebook.double()), [x], [codebook], "l2")


@pytest.mark.parametrize("metric", METRICS)
def test_topk_is_sorted_and_starts_with_the_best(metric):
    x, codebook = normal(40, 8, seed=1), normal(150, 8, seed=2)
    ids, scores = nearest_code(x, codebook, metric=metric, topk=70, return_scores=True, backend="native")
    assert ids.shape == scores.shape == (40, 70)
    assert torch.equal(ids[:, 0], nearest_code(x, codebook, metric=metric, backend="native"))
    assert (scores.diff(dim=1) >= 0).all() and all(len(row.unique()) == 70 for row in ids)
    assert torch.equal(ids, nearest_code(x, codebook, metric=metric, topk=70, backend="native"))
    exact = torch.stack([exact_scores([x], [codebook], ids[:, j], metric)[0] for j in range(70)], 1)
    assert_near(scores, exact, 1e-6, "scores")
    last = exact.max(1).values[:, None]
    everything = torch.stack([exact_scores([x], [codebook], torch.full((40,), k), metric)[0] for k in range(150)], 1)
    assert ((everything < last - 1e-5).sum(1) <= 70).all()


def test_topk_over_groups():
    x, codebook = normal(6, 3, 4, seed=1), normal(3, 20, 4, seed=2)
    ids, scores = nearest_code(x, codebook, topk=2, return_scores=True, backend="native")
    assert ids.shape == scores.shape == (6, 3, 2)
    twin_ids, twin_scores = reference.nearest_code(x.double(), codebook.double(), topk=2, return_scores=True)
    for j in range(2):
        group_near_ties(ids[..., j], twin_ids[..., j], x, codebook, "l2")
    assert_near(scores, twin_scores, 1e-5)


@pytest.mark.parametrize("window", [(0, 1), (5, 6), (31, 33), (17, 290), (64, 300)])
def test_window(window):
    x, codebook = normal(50, 8, seed=1), normal(300, 8, seed=2)
    lo, hi = window
    found = nearest_code(x, codebook, window=window, backend="native")
    assert torch.equal(found, nearest_code(x, codebook[lo:hi], backend="native") + lo)
    near_ties(found, reference.nearest_code(x.double(), codebook.double(), window=window), [x], [codebook], "l2")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("topk", [1, 3])
def test_exact_ties_go_to_the_lowest_id(metric, topk):
    codebook = normal(5, 8, seed=2)[torch.tensor([4, 0, 1, 2, 3] * 20)]
    ids = nearest_code(normal(200, 8, seed=1), codebook, metric=metric, topk=topk, backend="native").reshape(200, topk)
    assert (ids[:, 0] < 5).all()
    assert torch.equal(ids, ids[:, :1] + 5 * torch.arange(topk))


@pytest.mark.parametrize("metric", METRICS)
def test_zero_rows(metric):
    codebook = normal(40, 8, seed=2)
    codebook[:, 0] = 0
    found = nearest_code(torch.zeros(3, 8), codebook, metric=metric, backend="native")
    expected = codebook.double().square().sum(-1).argmin() if metric == "l2" else torch.tensor(0)
    assert torch.equal(found, expected.expand(3))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(bad, metric, backend):
    x, codebook = normal(70, 8, seed=1), normal(50, 8, seed=2)
    clean = nearest_code(x, codebook, metric=metric, window=(3, 40), backend=backend)
    x[[2, 66], [0, 7]] = bad
    with pytest.warns(RuntimeWarning, match="2 rows"):
        found, scores = nearest_code(x, codebook, metric=metric, window=(3, 40), return_scores=True, backend=backend)
    clean[[2, 66]] = 3
    assert torch.equal(found, clean)
    assert scores[[2, 66]].isnan().all() and scores.isnan().sum() == 2


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("topk", [1, 4])
def test_nan_codes_are_never_chosen(metric, topk, backend):
    x, codebook = normal(30, 8, seed=1), normal(50, 8, seed=2)
    best = nearest_code(x, codebook, metric=metric, backend=backend)
    codebook[best.unique()[:10], 3] = float("nan")
    found = nearest_code(x, codebook, metric=metric, topk=topk, backend=backend)
    assert codebook[found].isfinite().all()
    some = torch.full((4, 8), float("nan"))
    some[2] = 1.0
    assert (nearest_code(x, some, metric=metric, topk=topk, backend=backend).reshape(30, topk)[:, 0] == 2).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_nan_code_loses_to_an_overflowing_score(backend):
    codebook = torch.tensor([[float("nan")], [3e30]])
    assert nearest_code(torch.tensor([[1.0]]), codebook, backend=backend).item() == 1


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_all_codes_nan(backend):
    x = normal(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not nearest_code(x, torch.full((40, 2), float("nan")), backend=backend).any()
        windowed = nearest_code(x, torch.full((40, 2), float("nan")), window=(5, 9), backend=backend)
    assert (windowed == 5).all()


def test_views_and_empty_batches():
    x, codebook = normal(8, 20, seed=1), normal(8, 60, seed=2)
    expected = nearest_code(x.T.contiguous(), codebook.T.contiguous(), backend="native")
    assert torch.equal(nearest_code(x.T, codebook.T, backend="native"), expected)
    assert torch.equal(nearest_code(normal(40, 16, seed=5)[::3, ::2], codebook.T, backend="native"),
                       nearest_code(normal(40, 16, seed=5)[::3, ::2].clone(), codebook.T, backend="native"))  # fmt: skip
    assert nearest_code(torch.empty(0, 8), codebook.T, backend="native").shape == (0,)
    assert nearest_code(torch.empty(2, 0, 8), codebook.T, topk=3, backend="native").shape == (2, 0, 3)
    assert nearest_code(torch.empty(0, 2, 8), codebook.T.expand(2, 60, 8), backend="native").shape == (0, 2)
    assert nearest_code(x[:, 0], codebook.T, backend="native") == expected[0]


@pytest.mark.parametrize("metric", METRICS)
def test_batch_order_and_threads_change_nothing(metric):
    x, codebook = normal(333, 24, seed=1), normal(700, 24, seed=2)
    call = lambda rows: nearest_code(rows, codebook, metric=metric, return_scores=True, backend="native")  # noqa: E731
    ids, scores = call(x)
    for other_ids, other_scores in with_threads((1, 2, 3, 8), lambda: call(x)):
        assert torch.equal(ids, other_ids) and same_bits(scores, other_scores)
    order = torch.randperm(333, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(x[order])[0], ids[order]) and same_bits(call(x[order])[1], scores[order])
    parts = [call(part) for part in x.split([1, 2, 3, 64, 65, 198])]
    assert torch.equal(torch.cat([p[0] for p in parts]), ids) and same_bits(torch.cat([p[1] for p in parts]), scores)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70), codes=st.integers(1, 130), width=st.integers(1, 20), metric=st.sampled_from(METRICS),
    scale=st.sampled_from([1e-18, 1e-3, 1.0, 1e6]), seed=st.integers(0, 1000), levels=st.sampled_from([0, 3]),
)  # fmt: skip
def test_any_shape_gives_the_canonical_id(rows, codes, width, metric, scale, seed, levels):
    """Coarse levels make exact ties common, scales reach denormal and large products."""
    x, codebook = normal(rows, width, seed=seed), normal(codes, width, seed=seed + 1)
    if levels:
        x, codebook = (x * levels).round() / levels, (codebook * levels).round() / levels
    x, codebook = x * scale, codebook * scale
    exact = canonical_scores([x], [codebook], metric)
    found, scores = nearest_code(x, codebook, metric=metric, return_scores=True, backend="native")
    assert np.array_equal(found.numpy(), exact.argmin(1))
    assert np.array_equal(
        scores.numpy().view(np.int32), exact.min(1).view(np.int32) if rows else scores.numpy().view(np.int32)
    )


@pytest.mark.parametrize(("topk", "scores"), [(1, False), (3, True)])
def test_opcheck(topk, scores):
    opcheck("nearest_code", normal(9, 2, 4), normal(2, 20, 4), "cosine", topk, (2, 19), scores)
    opcheck("nearest_code", normal(9, 4), normal(20, 4), "l2", topk, None, scores, [3, 1], [1.0, 0.5])


def test_compile():
    x, codebook = normal(33, 8, seed=1), normal(70, 8, seed=2)
    call = lambda x, c: nearest_code(x, c, metric="cosine", topk=2, return_scores=True)  # noqa: E731
    ids, scores = compiled(call)(x, codebook)
    assert torch.equal(ids, call(x, codebook)[0]) and same_bits(scores, call(x, codebook)[1])


def test_ids_carry_no_gradient():
    ids, scores = nearest_code(
        normal(3, 4).requires_grad_(), normal(5, 4).requires_grad_(), return_scores=True, backend="native"
    )
    assert not ids.requires_grad and not scores.requires_grad


X, CODES = torch.zeros(3, 4), torch.zeros(7, 4)
BAD = [
    ("x", TypeError, {"x": [1.0]}),
    ("x", TypeError, {"x": X.long()}),
    ("x", TypeError, {"x": X.to(torch.complex64)}),
    ("x", ValueError, {"x": torch.zeros(3, 5)}),
    ("x", ValueError, {"x": torch.zeros(())}),
    ("x", ValueError, {"codebook": torch.zeros(2, 7, 4)}),
    ("x", ValueError, {"x": torch.zeros(3, 3, 4), "codebook": torch.zeros(2, 7, 4)}),
    ("codebook", TypeError, {"codebook": CODES.int()}),
    ("codebook", TypeError, {"codebook": None}),
    ("codebook", ValueError, {"codebook": torch.zeros(0, 4)}),
    ("codebook", ValueError, {"codebook": torch.zeros(4)}),
    ("codebook", ValueError, {"codebook": torch.zeros(7, 0), "x": torch.zeros(3, 0)}),
    ("codebook", ValueError, {"codebook": torch.zeros(0, 7, 4), "x": torch.zeros(3, 0, 4)}),
    ("codebook", ValueError, {"codebook": CODES.to("meta")}),
    ("metric", ValueError, {"metric": "euclid"}),
    ("metric", ValueError, {"metric": None}),
    ("topk", ValueError, {"topk": 0}),
    ("topk", ValueError, {"topk": 8}),
    ("topk", ValueError, {"topk": 3, "window": (0, 2)}),
    ("topk", TypeError, {"topk": 1.5}),
    ("topk", TypeError, {"topk": "2"}),
    ("window", ValueError, {"window": (3, 3)}),
    ("window", ValueError, {"window": (-1, 3)}),
    ("window", ValueError, {"window": (0, 8)}),
    ("window", ValueError, {"window": (0, 3, 5)}),
    ("window", TypeError, {"window": 3}),
    ("window", TypeError, {"window": (0.5, 3)}),
    ("return_scores", TypeError, {"return_scores": 1}),
    ("backend", ValueError, {"backend": "gpu"}),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("argument", "error", "change"), BAD, ids=[f"{a}-{list(c.values())[0]!r:.20}" for a, _, c in BAD]
)
def test_bad_input(argument, error, change, backend):
    arguments = {"x": X, "codebook": CODES, "backend": backend, **change}
    assert_sentence(
        error,
        "nearest_code",
        argument,
        lambda: ops.nearest_code(arguments.pop("x"), arguments.pop("codebook"), **arguments),
    )
