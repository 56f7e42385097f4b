"""The multi-scale loop and its decoder at TokenFlow's size: nine scales on 16 x 16, K = 32768, 32 + 8 channels."""

import pytest
import torch
import torch.nn.functional as F
from harness import Problem, assert_close, assert_same_ids, compare, normal
from tokenflow_expression import tokenflow_quantize

from tokenflow_ext import ops, reference

CODES, WIDTHS, SCALES = 32768, (32, 8), (1, 2, 4, 6, 8, 10, 12, 14, 16)
TOKENFLOW = "TokenFlow's expression"


def tokenflow_loop(features, tables, *, training: bool):
    """TokenFlow's residual loop around its quantizer, restated: area down, bicubic up, a detached residual."""
    size, residual, total, ids, losses = features.shape[2:], features, 0.0, [], []
    for s in SCALES:
        pooled = F.interpolate(residual, size=(s, s), mode="area").permute(0, 2, 3, 1).reshape(-1, sum(WIDTHS))
        q, index, loss = tokenflow_quantize(*pooled.split(WIDTHS, dim=1), *tables, training=training)
        step = q.view(-1, s, s, sum(WIDTHS)).permute(0, 3, 1, 2)
        up = F.interpolate(step, size=size, mode="bicubic")
        total, residual = total + up, residual - up.detach()
        ids.append(index.view(len(features), -1))
        losses.append(loss)
    return total, torch.cat(ids, 1), torch.stack(losses).mean() if training else None


def agreement(features, tables):
    """A check that follows each rival's own ids: one near-tie changes every later scale of its image."""

    def check(results):
        quantized, indices, *rest = results["native"]
        for rival, (other_quantized, other_indices, *other_rest) in results.items():
            if rival == "native":
                continue
            rows = ops.multiscale_rows(features, other_indices, tables, scales=SCALES)
            parts = rows.split(WIDTHS, dim=-1)
            exact = ops.shared_nearest_code(parts, tables)
            flat = [p.reshape(-1, p.shape[-1]) for p in parts]
            assert_same_ids(exact.flatten(), other_indices.flatten(), flat, tables, "cosine")
            same = (indices == other_indices).all(1)
            assert same.any()
            assert_close(quantized[same], other_quantized[same])
            if rest:
                assert_close(rest[0], other_rest[0])
                assert_close(rest[1][same], other_rest[1][same])
            if rest and same.all():
                for gradient, other in zip(rest[2:], other_rest[2:]):
                    assert_close(gradient, other)

    return check


def loop(batch: int, training: bool) -> Problem:
    """multiscale_quantize against its twin and, as far as its N x K matrices fit, TokenFlow's expression."""
    features = normal(batch, sum(WIDTHS), 16, 16, seed=1)
    tables = [F.normalize(normal(CODES, w, seed=w + 1), dim=-1) for w in WIDTHS]
    upstream = normal(*features.shape, seed=9) / features.numel()

    def step(call):
        if not training:
            with torch.no_grad():
                return tuple(call(features, tables))[:2]
        inputs = [t.detach().requires_grad_() for t in (features, *tables)]
        quantized, indices, loss = call(inputs[0], inputs[1:])
        return quantized, indices, loss, *torch.autograd.grad((quantized, loss), inputs, (upstream, torch.ones(())))

    calls = {
        "native": lambda: step(lambda x, t: ops.multiscale_quantize(x, t, scales=SCALES)),
        "twin": lambda: step(lambda x, t: reference.multiscale_quantize(x, t, scales=SCALES)),
    }
    if batch == 1 or not training:
        calls[TOKENFLOW] = lambda: step(lambda x, t: tokenflow_loop(x, t, training=training))
    name = "forward + backward" if training else "forward"
    size = f"B {batch}, {batch * sum(s * s for s in SCALES)} rows, K {CODES}, {WIDTHS[0]} + {WIDTHS[1]}"
    return Problem(f"multiscale_quantize, {name}", size, calls, agreement(features, tables))


def decoder(batch: int) -> Problem:
    """multiscale_decode, forward and backward, against its twin."""
    length = sum(s * s for s in SCALES)
    ids = torch.randint(CODES, (batch, length), generator=torch.Generator().manual_seed(3))
    tables = [normal(CODES, w, seed=w + 1) for w in WIDTHS]
    upstream = normal(batch, sum(WIDTHS), 16, 16, seed=9)

    def step(module):
        inputs = [t.detach().requires_grad_() for t in tables]
        decoded = module.multiscale_decode(ids, inputs, scales=SCALES, size=16)
        return decoded, *torch.autograd.grad(decoded, inputs, upstream)

    def check(results):
        for actual, expected in zip(results["native"], results["twin"]):
            assert_close(actual, expected)

    calls = {"native": lambda: step(ops), "twin": lambda: step(reference)}
    return Problem(
        "multiscale_decode, forward + backward", f"B {batch}, {batch * length} rows, K {CODES}", calls, check
    )


PROBLEMS = {
    "forward, batch 1": lambda: loop(1, False),
    "forward, batch 16": lambda: loop(16, False),
    "forward + backward, batch 1": lambda: loop(1, True),
    "forward + backward, batch 16": lambda: loop(16, True),
    "decode, batch 16": lambda: decoder(16),
}


def problem(name: str) -> Problem:
    """One of PROBLEMS."""
    return PROBLEMS[name]()


@pytest.mark.parametrize("name", PROBLEMS)
def bench_multiscale(benchmark, name):
    """Faster than either and without their N x K matrices."""
    for row in compare(benchmark, "bench_multiscale", name).values():
        assert row["times_faster"] > 1 and row["times_less_memory"] > 1, row
