"""code_statistics and ema_update_: the moving average of a codebook, against the formulas of api.md in float64."""

import pytest
import torch
from harness import (
    FLOATS,
    METRICS,
    assert_near,
    assert_sentence,
    compiled,
    leaves,
    normal,
    opcheck,
    same_bits,
    with_threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext import ops, reference
from tokenflow_ext.ops import code_statistics, ema_update_


def integers(*shape, high, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def dense_statistics(x, indices, codes):
    """counts and sums by a one-hot product in float64, x [N, D]."""
    hot = torch.nn.functional.one_hot(indices, codes).double()
    return hot.sum(0), hot.T @ x.double()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "codes", "width"), [(1, 1, 1), (500, 7, 5), (70, 300, 33), (0, 4, 3)])
def test_counts_and_sums(rows, codes, width, dtype):
    x, indices = normal(rows, width, seed=1, dtype=dtype), integers(rows, high=codes)
    counts, sums = code_statistics(x, indices, codes, backend="native")
    real = torch.float64 if dtype == torch.float64 else torch.float32
    assert counts.dtype == sums.dtype == real
    expected_counts, expected_sums = dense_statistics(x, indices, codes)
    assert torch.equal(counts.double(), expected_counts)
    assert_near(sums, expected_sums, 1e-5 if real == torch.float32 else 1e-13)
    twin_counts, twin_sums = reference.code_statistics(x, indices, codes)
    assert torch.equal(counts, twin_counts)
    assert_near(sums, twin_sums, 1e-5)


def test_groups_and_leading_axes():
    x, indices = normal(4, 5, 3, 6, seed=1), integers(4, 5, 3, high=11)
    counts, sums = code_statistics(x, indices, (3, 11), backend="native")
    assert counts.shape == (3, 11) and sums.shape == (3, 11, 6)
    for g in range(3):
        alone = code_statistics(x[..., g, :], indices[..., g], 11, backend="native")
        assert torch.equal(counts[g], alone[0]) and same_bits(sums[g], alone[1])


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(
    ("rows", "codes", "groups", "width"), [(6000, 50, 1, 40), (5000, 9000, 1, 8), (3000, 300, 8, 8)]
)
def test_threads_and_buckets_change_no_bit(rows, codes, groups, width, skewed):
    """Threads and buckets only decide who adds: every code adds its rows in row order, in float64."""
    x, indices = normal(rows, groups, width, seed=1), integers(rows, groups, high=codes)
    x[7, 0, 3] = float("nan")
    if skewed:  # half of the rows chose one code
        indices[::2] = codes - 1
    with pytest.warns(RuntimeWarning, match="1 rows"):
        first, *others = with_threads(
            (1, 2, 3, 8, 64), lambda: code_statistics(x, indices, (groups, codes), backend="native")
        )
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other))
    good = x.isfinite().all(-1)
    wide, counts = torch.zeros(groups, codes, width, dtype=torch.float64), torch.zeros(groups, codes)
    for g in range(groups):
        wide[g].index_add_(0, indices[good[:, g], g], x[good[:, g], g].double())
        counts[g].index_add_(0, indices[good[:, g], g], torch.ones(int(good[:, g].sum())))
    assert torch.equal(first[0], counts) and same_bits(first[1], wide.float())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows_that_are_not_finite_are_left_out(backend):
    x, indices = normal(70, 4, seed=1), integers(70, high=9)
    x[3, 0], x[66, 3] = float("nan"), float("inf")
    rest = [i for i in range(70) if i not in (3, 66)]
    with pytest.warns(RuntimeWarning, match="2 rows"):
        counts, sums = code_statistics(x, indices, 9, backend=backend)
    expected_counts, expected_sums = dense_statistics(x[rest], indices[rest], 9)
    assert torch.equal(counts.double(), expected_counts)
    assert_near(sums, expected_sums, 1e-6)


def test_views_and_gradients():
    x, indices = normal(6, 30, seed=1).T, integers(2, 30, high=5).T[:, 0]
    counts, sums = code_statistics(x.requires_grad_(), indices, 5, backend="native")
    assert not counts.requires_grad and not sums.requires_grad
    assert same_bits(sums, code_statistics(x.contiguous(), indices.contiguous(), 5, backend="native")[1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(0, 300), codes=st.integers(1, 60), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_shape(rows, codes, width, seed):
    x, indices = normal(rows, width, seed=seed), integers(rows, high=codes, seed=seed)
    counts, sums = code_statistics(x, indices, codes, backend="native")
    expected_counts, expected_sums = dense_statistics(x, indices, codes)
    assert torch.equal(counts.double(), expected_counts)
    assert_near(sums, expected_sums, 1e-5)


def ema_state(shape, dtype=torch.float32, seed=0):
    """codebook, ema_counts, ema_sums after some steps, and the counts and sums of a batch in which code 1 has no row."""
    codebook = normal(*shape, seed=seed, dtype=dtype)
    counts = integers(*shape[:-1], high=5, seed=seed).to(dtype) + 1
    counts[..., 1 % shape[-2]] = 0
    sums = normal(*shape, seed=seed + 1, dtype=dtype) * counts[..., None]
    return codebook, normal(*shape[:-1], seed=seed + 2, dtype=dtype).abs() + 0.1, codebook.clone() * 2, counts, sums


def ema_by_formula(codebook, ema_counts, ema_sums, counts, sums, decay, eps, metric, normalize_mean):
    """api.md, line by line, for one group in float64: what the three written tensors become."""
    if normalize_mean:
        sums = torch.nn.functional.normalize(sums / counts.clamp_min(1)[:, None], dim=-1, eps=1e-12)
    ema_counts = decay * ema_counts + (1 - decay) * counts
    ema_sums = decay * ema_sums + (1 - decay) * sums
    n = ema_counts.sum()
    moved = ema_sums / ((ema_counts + eps) / (n + len(ema_counts) * eps) * n)[:, None]
    if metric == "cosine":
        moved = torch.nn.functional.normalize(moved, dim=-1, eps=1e-12)
    return torch.where(counts[:, None] > 0, moved, codebook), ema_counts, ema_sums


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalize_mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 3), (3, 40, 8), (1, 1), (900, 33)])
def test_ema_follows_the_formula(shape, dtype, normalize_mean, metric, backend):
    state = ema_state(shape, dtype)
    before = [t.clone() for t in state]
    options = {"decay": 0.8, "eps": 1e-3, "metric": metric, "normalize_mean": normalize_mean}
    returned = ema_update_(*state, **options, backend=backend)
    assert returned is state[0]
    groups = [[t[g] for t in before] for g in range(shape[0])] if len(shape) == 3 else [before]
    results = [ema_by_formula(*(t.double() for t in group), 0.8, 1e-3, metric, normalize_mean) for group in groups]
    for name, actual, parts in zip(("codebook", "ema_counts", "ema_sums"), state, zip(*results)):
        expected = torch.stack(parts) if len(shape) == 3 else parts[0]
        assert_near(actual, expected, 2e-6 if dtype == torch.float32 else 1e-13, name)
    idle = before[3] == 0
    assert same_bits(state[0][idle], before[0][idle]), "codes without rows keep their vector"
    assert same_bits(state[3], before[3]) and same_bits(state[4], before[4]), "the batch's statistics are read only"


def test_ema_defaults():
    state, other = ema_state((9, 4)), ema_state((9, 4))
    ema_update_(*state, decay=0.9, backend="native")
    ema_update_(*other, decay=0.9, eps=1e-5, metric="cosine", normalize_mean=False, backend="native")
    assert all(same_bits(a, b) for a, b in zip(state, other))


def test_repeated_batches_lead_to_the_mean():
    """From ema_counts = 1, ema_sums = codebook, as api.md starts."""
    codebook, rows = normal(3, 4, seed=1, dtype=torch.float64), normal(30, 4, seed=2, dtype=torch.float64)
    indices = integers(30, high=2)
    counts, sums = code_statistics(rows, indices, 3)
    ema_counts, ema_sums, untouched = torch.ones(3, dtype=torch.float64), codebook.clone(), codebook[2].clone()
    for _ in range(400):
        ema_update_(codebook, ema_counts, ema_sums, counts, sums, decay=0.9, eps=0.0, metric="l2")
    assert_near(codebook[:2], sums[:2] / counts[:2, None], 1e-12)
    assert same_bits(codebook[2], untouched)


def test_threads_change_no_bit_of_the_ema():
    def call():
        state = ema_state((4, 3000, 8))
        ema_update_(*state, decay=0.9, backend="native")
        return state[:3]

    first, *others = with_threads((1, 2, 3, 8, 64), call)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_written_tensor_gets_a_new_version(backend):
    state = ema_state((7, 3))
    versions = [t._version for t in state]
    ema_update_(*state, decay=0.9, backend=backend)
    assert all(t._version > v for t, v in zip(state[:3], versions)) and [t._version for t in state[3:]] == versions[3:]


def test_a_graph_that_saved_the_codebook_notices():
    state = ema_state((7, 3))
    (x,) = leaves(normal(3))
    value = (state[0] * x).sum()
    ema_update_(*state, decay=0.9, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_views_of_the_batch_statistics():
    state, other = ema_state((7, 4)), ema_state((7, 4))
    ema_update_(*state[:3], state[3], state[4].T.contiguous().T, decay=0.9, backend="native")
    ema_update_(*other, decay=0.9, backend="native")
    assert same_bits(state[0], other[0])


def test_opcheck():
    opcheck("code_statistics", normal(9, 2, 4), integers(9, 2, high=5), [2, 5])
    opcheck("code_statistics", normal(9, 4), integers(9, high=5), [5])
    codebook, ema_counts, ema_sums, counts, sums = ema_state((2, 7, 4))
    opcheck("ema_update_", codebook, ema_counts, ema_sums, counts, sums, 0.9, 1e-5, "cosine", False)


def test_compile():
    x, indices = normal(50, 4, seed=1), integers(50, high=7)
    state, other = list(ema_state((7, 4))[:3]), list(ema_state((7, 4))[:3])

    def step(codebook, ema_counts, ema_sums):
        counts, sums = code_statistics(x, indices, 7)
        ema_update_(codebook, ema_counts, ema_sums, counts, sums, decay=0.9, metric="l2")
        return codebook.sum()

    value = compiled(step)(*state)
    assert_near(value, step(*other), 1e-6)
    assert all(same_bits(a, b) for a, b in zip(state, other))


X, IDS = torch.zeros(3, 4), torch.tensor([0, 1, 2])
STATISTICS_BAD = {
    "no tensor": ("x", TypeError, {"x": None}),
    "integers": ("x", TypeError, {"x": X.long()}),
    "int32": ("indices", TypeError, {"indices": IDS.int()}),
    "count of ids": ("indices", ValueError, {"indices": IDS[:2]}),
    "too large": ("indices", ValueError, {"indices": IDS + 5}),
    "negative": ("indices", ValueError, {"indices": IDS - 1}),
    "device": ("indices", ValueError, {"indices": IDS.to("meta")}),
    "no codes": ("codes", ValueError, {"codes": 0}),
    "no groups": ("codes", ValueError, {"codes": (0, 7)}),
    "three sizes": ("codes", ValueError, {"codes": (1, 2, 3)}),
    "fraction": ("codes", TypeError, {"codes": 7.0}),
    "word": ("codes", TypeError, {"codes": "7"}),
    "groups": ("x", ValueError, {"codes": (2, 7)}),
    "backend": ("backend", ValueError, {"backend": "x"}),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", STATISTICS_BAD)
def test_bad_input_of_statistics(case, backend):
    argument, error, change = STATISTICS_BAD[case]
    a = {"x": X, "indices": IDS, "codes": 7, "backend": backend, **change}
    call = lambda: ops.code_statistics(a["x"], a["indices"], a["codes"], backend=a["backend"])  # noqa: E731
    assert_sentence(error, "code_statistics", argument, call)


NAMES = ("codebook", "ema_counts", "ema_sums", "counts", "sums")
GRAD, HALF = torch.zeros(7, 4, requires_grad=True), torch.zeros(7, 4, dtype=torch.float16)
EMA_BAD = {
    "codebook kind": ("codebook", TypeError, {"codebook": None}),
    "codebook half": ("codebook", TypeError, {"codebook": HALF}),
    "codebook rank": ("codebook", ValueError, {"codebook": torch.zeros(7)}),
    "codebook grad": ("codebook", ValueError, {"codebook": GRAD}),
    "codebook view": ("codebook", ValueError, {"codebook": torch.zeros(4, 7).T}),
    "counts shape": ("ema_counts", ValueError, {"ema_counts": torch.ones(6)}),
    "counts kind": ("ema_counts", TypeError, {"ema_counts": [1.0]}),
    "counts type": ("ema_counts", TypeError, {"ema_counts": torch.ones(7, dtype=torch.float64)}),
    "counts grad": ("ema_counts", ValueError, {"ema_counts": torch.ones(7, requires_grad=True)}),
    "sums shape": ("ema_sums", ValueError, {"ema_sums": torch.zeros(7, 5)}),
    "sums grad": ("ema_sums", ValueError, {"ema_sums": GRAD}),
    "sums view": ("ema_sums", ValueError, {"ema_sums": torch.zeros(4, 7).T}),
    "batch counts": ("counts", ValueError, {"counts": torch.ones(1, 7)}),
    "batch counts kind": ("counts", TypeError, {"counts": torch.ones(7, dtype=torch.int64)}),
    "batch sums": ("sums", ValueError, {"sums": torch.zeros(7, 5)}),
    "batch sums type": ("sums", TypeError, {"sums": HALF}),
    "device": ("sums", ValueError, {"sums": torch.zeros(7, 4, device="meta")}),
    "decay": ("decay", ValueError, {"decay": 1.5}),
    "decay nan": ("decay", ValueError, {"decay": float("nan")}),
    "decay kind": ("decay", TypeError, {"decay": "0.9"}),
    "eps": ("eps", ValueError, {"eps": -1e-5}),
    "eps kind": ("eps", TypeError, {"eps": None}),
    "metric": ("metric", ValueError, {"metric": "x"}),
    "normalize_mean": ("normalize_mean", TypeError, {"normalize_mean": "yes"}),
    "backend": ("backend", ValueError, {"backend": "x"}),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", EMA_BAD)
def test_bad_input_of_ema(case, backend):
    argument, error, change = EMA_BAD[case]
    a = {**dict(zip(NAMES, ema_state((7, 4)))), "decay": 0.9, "backend": backend, **change}
    assert_sentence(error, "ema_update_", argument, ops.ema_update_, **a)
