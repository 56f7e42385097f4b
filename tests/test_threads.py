"""Thread counts change no bit: ids, values, losses, gradients and statistics of every op, and of calls made at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import leaves, normal, same_bits, with_threads

from tokenflow_ext import ops

ROWS, CODES, GROUPS = 3001, 611, 3  # enough for every kernel to share its work
SCALES = ((1, 1), (2, 3), (5, 4), (7, 7))


def _with_gradients(call, *inputs):
    """Every output of call(*inputs), then the gradients of all that are differentiable."""
    inputs = leaves(*inputs)
    outputs = [t for t in _flat(call(*inputs))]
    reached = [t for t in outputs if t.requires_grad]
    upstream = [normal(*t.shape, seed=90 + i, dtype=t.dtype) for i, t in enumerate(reached)]
    return [*outputs, *torch.autograd.grad(reached, inputs, upstream, allow_unused=True)]


def _flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in _flat(part)]


def _rows(dtype=torch.float32):
    x = normal(ROWS, GROUPS, 9, seed=1, dtype=dtype)
    x[5, 1, 3] = float("nan")
    return x


def _ids(seed=3, codes=CODES):
    return torch.randint(codes, (ROWS, GROUPS), generator=torch.Generator().manual_seed(seed))


def _tables():
    return normal(CODES, 6, seed=4), normal(CODES, 3, seed=5)


def _nearest_code(metric, topk=1):
    return ops.nearest_code(
        _rows(), normal(GROUPS, CODES, 9, seed=2), metric=metric, topk=topk, return_scores=True, backend="native"
    )


def _shared(op, *, gradients):
    call = lambda *t: getattr(ops, op)(t[:2], t[2:], weights=(1, 0.3), backend="native")  # noqa: E731
    inputs = normal(ROWS, 6, seed=1), normal(ROWS, 3, seed=2), *_tables()
    return _with_gradients(call, *inputs) if gradients else _flat(call(*inputs))


def _quantize(metric, dtype=torch.float32):
    call = lambda x, c: ops.quantize(x, c, metric=metric, backend="native")  # noqa: E731
    return _with_gradients(call, _rows(dtype), normal(GROUPS, CODES, 9, seed=2))


def _ema(metric):
    state = normal(GROUPS, CODES, 9, seed=6), torch.ones(GROUPS, CODES), normal(GROUPS, CODES, 9, seed=7)
    counts, sums = ops.code_statistics(_rows(), _ids(), (GROUPS, CODES), backend="native")
    ops.ema_update_(*state, counts, sums, decay=0.9, metric=metric, backend="native")
    return [counts, sums, *state]


def _multiscale(op, *arguments, inputs=(), **options):
    def call(*t):
        return getattr(ops, op)(*t[: len(inputs)], *arguments, t[-2:], scales=SCALES, backend="native", **options)

    return _with_gradients(call, *inputs, *_tables())


def _multiscale_ids():
    length = sum(h * w for h, w in SCALES)
    return torch.randint(CODES, (5, length), generator=torch.Generator().manual_seed(8))


def _phi():
    return normal(2, 9, 9, 3, 3, seed=10) / 9, normal(2, 9, seed=11), 0.5, (0, 0, 1, 1)


def _features():
    return normal(5, 9, 7, 7, seed=9)


CASES = {
    "normalize_rows": lambda: _with_gradients(lambda x: ops.normalize_rows(x, backend="native"), normal(4099, 40, seed=1)),
    **{f"nearest_code {m}": lambda m=m: _nearest_code(m) for m in ("cosine", "l2", "dot")},
    "nearest_code topk": lambda: _nearest_code("l2", topk=5),
    "nearest_code, few rows": lambda: [
        ops.nearest_code(normal(n, 9, seed=1), normal(5000, 9, seed=2), metric="cosine", backend="native") for n in (1, 2, 9)
    ],
    "shared_nearest_code": lambda: _shared("shared_nearest_code", gradients=False),
    "lookup": lambda: _with_gradients(lambda c: ops.lookup(_ids(), c, backend="native"), normal(GROUPS, CODES, 40, seed=2)),
    "shared_lookup": lambda: _with_gradients(lambda *c: ops.shared_lookup(_ids()[:, 0], c, backend="native"), *_tables()),
    **{f"quantize {m}": lambda m=m: _quantize(m) for m in ("cosine", "l2", "dot")},
    "quantize bfloat16": lambda: _quantize("cosine", torch.bfloat16),
    "quantize float64": lambda: _quantize("cosine", torch.float64),
    "shared_quantize": lambda: _shared("shared_quantize", gradients=True),
    "code_statistics, few codes": lambda: ops.code_statistics(_rows(), _ids(codes=3), (GROUPS, 3), backend="native"),
    **{f"code_statistics, ema_update_ {m}": lambda m=m: _ema(m) for m in ("cosine", "l2")},
    "entropy_loss": lambda: _with_gradients(
        lambda x, c: ops.entropy_loss(x, c, metric="cosine", temperature=0.1, backend="native"),
        _rows(), normal(GROUPS, CODES, 9, seed=2),
    ),
    "soft_quantize": lambda: _with_gradients(
        lambda *t: ops.soft_quantize(*t, backend="native"), _rows()[:, 0], normal(CODES, 9, seed=2), normal(CODES, 5, seed=3)
    ),
    "multiscale_quantize": lambda: _multiscale("multiscale_quantize", inputs=[_features()], weights=(1, 0.3)),
    "multiscale_quantize, phi": lambda: _multiscale(
        "multiscale_quantize", inputs=[_features()], metric="l2", loss_on="accumulated", phi=_phi()
    ),
    "multiscale_rows": lambda: _with_gradients(
        lambda f: ops.multiscale_rows(f, _multiscale_ids(), _tables(), scales=SCALES, backend="native"), _features()
    ),
    "multiscale_decode": lambda: _multiscale("multiscale_decode", _multiscale_ids(), size=7, metric="l2", phi=_phi()),
    "multiscale_inputs accumulate": lambda: _multiscale("multiscale_inputs", _multiscale_ids(), size=7, rule="accumulate"),
    "multiscale_inputs chain": lambda: _multiscale("multiscale_inputs", _multiscale_ids(), size=7, rule="chain"),
}  # fmt: skip


def test_every_op_has_a_case():
    assert {name.split(",")[0].split(" ")[0] for name in CASES} | {"ema_update_"} == set(ops.__all__)


@pytest.mark.filterwarnings("ignore:.*rows hold NaN")
@pytest.mark.parametrize("name", CASES)
def test_thread_counts_change_no_bit(name):
    one, *others = with_threads((1, 2, 3, 8, 64), CASES[name])
    assert len(one) > 0
    for count, other in zip((2, 3, 8, 64), others):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert (a is None and b is None) or same_bits(a, b), f"result {i} with {count} threads"


@pytest.mark.filterwarnings("ignore:.*rows hold NaN")
def test_calls_from_four_python_threads_at_once():
    """Kernels release the GIL and keep no state: every op beside every other gives the bits that it gives alone."""
    alone = {name: case() for name, case in CASES.items()}
    with ThreadPoolExecutor(4) as pool:
        names = [name for _ in range(3) for name in CASES]
        for name, found in zip(names, pool.map(lambda name: CASES[name](), names)):
            for i, (a, b) in enumerate(zip(alone[name], found, strict=True)):
                assert (a is None and b is None) or same_bits(a, b), f"{name}: result {i}"
