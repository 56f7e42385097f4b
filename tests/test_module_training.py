"""A training loop around the modules: autocast, checkpointing, optimisers, threads, workers; each counts a batch once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import assert_gradients, python, same_bits, with_threads
from module_cases import KINDS, UPDATES, build, codebook, features, state, step
from torch.utils.checkpoint import checkpoint

from tokenflow_ext.quantize import Quantized

HALF = [torch.bfloat16, torch.float16]


def assert_same_state(a, b):
    left, right = state(a), state(b)
    assert left.keys() == right.keys() and all(same_bits(t, right[name]) for name, t in left.items())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind, update, dtype):
    """On the same features: ids, values, loss, gradients and state of float32, bit for bit, backward inside or outside."""
    plain, cast = build(kind, update), build(kind, update)
    for n in range(2):
        x = features(kind, seed=n)
        torch.manual_seed(n)
        expected = step(plain, x)
        torch.manual_seed(n)
        with torch.autocast("cpu", dtype=dtype):
            actual = step(cast, x)
            assert torch.equal(cast.encode(x), plain.encode(x))
            assert same_bits(cast.decode(actual[1]), plain.decode(actual[1]))
        assert actual[2].dtype == torch.float32
        assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))
    assert_same_state(plain, cast)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["groups", "multi shared"])
def test_autocast_around_an_encoder(kind, dtype):
    """What a cast layer gives is half; its tokens are those of the float32 search on these very features."""
    quantizer, x = build(kind), features(kind)
    layer = torch.nn.Conv2d(12, 12, 1) if "multi" in kind else torch.nn.Linear(12, 12)
    with torch.autocast("cpu", dtype=dtype):
        half = layer(x)
        out = quantizer(half)
        (out.quantized.square().mean() + out.loss).backward()
    assert half.dtype == out.quantized.dtype == dtype and out.loss.dtype == torch.float32
    assert torch.equal(out.indices, quantizer.encode(half.float()))
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_batches_count_once(kind, update, reentrant):
    """Hits, moving averages and revival of one forward, and its gradients; the second draws no random number."""
    plain, checkpointed = build(kind, update), build(kind, update)
    for n in range(2):
        x = features(kind, seed=n)
        torch.manual_seed(n)
        expected, after = step(plain, x), torch.rand(3)
        torch.manual_seed(n)
        actual = step(checkpointed, x, call=lambda y: Quantized(*checkpoint(checkpointed, y, use_reentrant=reentrant)))
        assert torch.equal(torch.rand(3), after)
        assert torch.equal(actual[1], expected[1])
        if update in ("gradient", "none", "entropy"):  # the others search codes again that the batch has moved
            assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))
    assert_same_state(plain, checkpointed)
    assert int(codebook(checkpointed).hits.sum()) == 2 * actual[1].numel()


def _run(kind, update, steps=20):
    """Twenty steps of SGD on one seed: every result of the last, and the state."""
    quantizer = build(kind, update)
    learned = list(quantizer.parameters())
    optimiser = torch.optim.SGD(learned, lr=0.1, momentum=0.9) if learned else None
    torch.manual_seed(0)
    for n in range(steps):
        quantizer.zero_grad()
        results = step(quantizer, features(kind, 20, seed=n))
        if optimiser is not None:
            optimiser.step()
    return [*results, *state(quantizer).values()]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_over_runs_and_threads(kind, update):
    torch.use_deterministic_algorithms(True)  # an op without a deterministic kernel raises
    first, again, two = with_threads((1, 1, 2), lambda: _run(kind, update))
    for results in (again, two):
        assert all(same_bits(a, b) for a, b in zip(results, first, strict=True))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_optimisers_move_the_codebook(kind, options):
    """AdamW in all of its ways, after half() too: the tables are ordinary float32 parameters, in place."""
    quantizer, plain = build(kind).half(), build(kind)
    optimiser = torch.optim.AdamW(quantizer.parameters(), lr=0.05, **options)
    slow = torch.optim.AdamW(plain.parameters(), lr=0.05, foreach=False)
    for n in range(3):
        x = features(kind, 32, seed=n, dtype=torch.float16)
        for module, walker in ((quantizer, optimiser), (plain, slow)):
            walker.zero_grad()
            out = module(x)
            out.loss.backward()
            walker.step()
    assert_gradients([t.detach() for t in quantizer.codebooks()], [t.detach() for t in plain.codebooks()], 1e-5)
    assert not any(torch.equal(a, b) for a, b in zip(quantizer.codebooks(), build(kind).codebooks()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate(kind):
    """Backward twice before a step adds up; nothing is overwritten."""
    quantizer, x = build(kind), [features(kind, seed=n) for n in range(2)]
    each = []
    for part in x:
        quantizer.zero_grad()
        quantizer(part).loss.backward()
        each.append([p.grad.clone() for p in quantizer.parameters()])
    quantizer.zero_grad()
    for part in x:
        quantizer(part).loss.backward()
    for p, a, b in zip(quantizer.parameters(), *each, strict=True):
        assert same_bits(p.grad, a + b)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_loss_scales_gradients_alone(kind, update):
    """GradScaler's powers of two: gradients in proportion, results and state the same bits; inf where it overflowed."""
    plain, scaled, x = build(kind, update), build(kind, update), features(kind, dtype=torch.float16)
    torch.manual_seed(0)
    expected = step(plain, x.float())
    torch.manual_seed(0)
    actual = step(scaled, x.float(), scale=2.0**16)
    assert all(same_bits(a, b) for a, b in zip(actual[:3], expected[:3], strict=True))
    assert all(same_bits(a, b * 2**16) for a, b in zip(actual[3:], expected[3:], strict=True))
    assert_same_state(plain, scaled)
    torch.manual_seed(0)
    overflown = step(build(kind, update), x, scale=2.0**40)[3]
    assert overflown.dtype == torch.float16 and not overflown.isfinite().all(), "an overflow must show"


def test_a_gradient_scaler_skips_the_step_that_overflowed():
    quantizer, x = build("vector"), features("vector").requires_grad_()
    before = state(quantizer)
    optimiser = torch.optim.SGD([*quantizer.parameters(), x], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for scale in (40, 39):
        optimiser.zero_grad()
        out = quantizer(x.half())
        scaler.scale(out.quantized.float().square().sum() + out.loss).backward()
        assert scaler.get_scale() == 2.0**scale
        scaler.unscale_(optimiser)
        scaler.step(optimiser)
        scaler.update()
    assert torch.equal(quantizer.codebooks()[0], before["codebook.table_0"])


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(kind):
    """encode, decode and forward in eval; in training the state moves there as outside, and training goes on after it."""
    plain, quantizer, x = build(kind, "ema, revived"), build(kind, "ema, revived"), features(kind)
    torch.manual_seed(0)
    expected = plain(x)
    torch.manual_seed(0)
    with torch.inference_mode():
        out = quantizer(x)
        assert torch.equal(quantizer.encode(x), plain.encode(x))
        assert same_bits(quantizer.decode(out.indices), plain.decode(out.indices))
    assert all(same_bits(a, b) for a, b in zip(out, expected, strict=True))
    assert_same_state(plain, quantizer)
    plain.eval(), quantizer.eval()
    with torch.inference_mode():
        assert all(same_bits(a, b) for a, b in zip(quantizer(x), plain(x), strict=True))
    step(quantizer.train(), x)


@pytest.mark.parametrize("kind", KINDS)
def test_python_threads_at_once(kind):
    """Four threads encode, decode and run forward in eval on one module: the results of one after the other."""
    quantizer, batches = build(kind).eval(), [features(kind, 30 + n, seed=n) for n in range(12)]

    def call(x):
        out = quantizer(x)
        return [*out, quantizer.encode(x), quantizer.decode(out.indices)]

    expected = [call(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(call, batches * 3), expected * 3, strict=True):
            assert all(same_bits(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_python_threads_train_at_once(kind):
    """With the gradient rule, forward and backward from several threads on one module."""
    quantizer, batches = build(kind), [features(kind, 20 + n, seed=n) for n in range(8)]

    def gradients(x):
        return torch.autograd.grad(quantizer(x).loss, list(quantizer.parameters()))

    expected = [gradients(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(gradients, batches), expected, strict=True):
            assert all(same_bits(a, b) for a, b in zip(found, alone, strict=True))


WORKERS = """
import multiprocessing, torch
from torch.utils.data import DataLoader, Dataset
from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer


class Encoded(Dataset):
    def __init__(self, quantizers, items):
        self.quantizers, self.items = quantizers, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, n):
        return [q.encode(self.items[n] if isinstance(q, MultiScaleQuantizer) else self.items[n].flatten(2).mT) for q in self.quantizers]


if __name__ == "__main__":
    torch.set_num_threads(2)
    items = torch.randn(4, 64, 12, 8, 8)
    made = [
        VectorQuantizer(12, 512, groups=3), SharedIndexQuantizer((8, 4), 512),
        MultiScaleQuantizer(SharedIndexQuantizer((8, 4), 512), (1, 2, 4, 8)),
    ]
    data = Encoded(made, items)
    expected = [data[n] for n in range(4)]  # the parent's threads have run
    for start in ("fork", "spawn"):
        loader = DataLoader(data, num_workers=2, batch_size=None, multiprocessing_context=start, timeout=100)
        found = list(loader)
        assert len(found) == 4 and all(torch.equal(a, b) for x, y in zip(found, expected) for a, b in zip(x, y)), start
        assert [torch.equal(a, b) for x, y in zip([data[n] for n in range(4)], expected) for a, b in zip(x, y)]
        print(start)
"""


def test_workers_of_a_loader_encode(tmp_path):
    """Forked and spawned workers encode in __getitem__ after threads of the parent ran: no hang, the same ids."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = python(
        f"import runpy, sys; sys.argv = [{str(script)!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    assert done.returncode == 0 and done.stdout.split() == ["fork", "spawn"], done.stderr


def test_a_forked_child_trains():
    """os.fork after the parent's threads ran: the child encodes as it is, and trains with one thread for torch's own ops."""
    script = """
import os, torch
from tokenflow_ext.quantize import MultiScaleQuantizer, VectorQuantizer
torch.set_num_threads(2)
x = torch.randn(32, 12, 8, 8)
made = [
    VectorQuantizer(12, 512, channel_dim=1, update="ema", dead_code_threshold=1),
    MultiScaleQuantizer(VectorQuantizer(12, 512, entropy_weight=0.1), (1, 4, 8)),
]
def train():
    for quantizer in made:
        y = x.clone().requires_grad_()
        out = quantizer(y)
        (out.loss + out.quantized.square().mean()).backward()
        assert y.grad.isfinite().all() and y.grad.any()
train()
encoded = [q.encode(x) for q in made]
child = os.fork()
if child == 0:
    code = 3
    try:
        assert all(torch.equal(q.encode(x), ids) for q, ids in zip(made, encoded))
        torch.set_num_threads(1)
        train()
        code = 0
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
train()
"""
    done = python(script)
    assert done.returncode == 0, done.stderr
