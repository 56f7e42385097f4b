"""The multi-scale loop and its decoder at three published sizes, against the twin and the authors' expressions.

TokenFlow: 9 scales on 16 x 16. TokenFlow XL: 15 scales on 27 x 27. Both K = 32768, 32 + 8 channels, cosine. VAR: 10
scales on 16 x 16, K = 4096, 32 channels, l2, loss on accumulated maps and four convolutions phi.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
import var_expression
from harness import Problem, assert_close, assert_same_ids, compare, normal
from tokenflow_expression import tokenflow_quantize

from tokenflow_ext import ops, reference

TOKENFLOW, VAR = "TokenFlow's expression", "VAR's expression"


@dataclass
class Size:
    """A published size: grids on a map of side x side, codes, table widths, and the options of the loop."""

    side: int
    scales: tuple[int, ...]
    codes: int
    widths: tuple[int, ...]
    metric: str = "cosine"
    options: dict = field(default_factory=dict)
    phi: bool = False

    def inputs(self, batch: int) -> list[torch.Tensor]:
        """features, codebooks, and phi's weight and bias where there is one."""
        tensors = [normal(batch, sum(self.widths), self.side, self.side, seed=1)]
        for w in self.widths:
            table = normal(self.codes, w, seed=w + 1)
            tensors.append(F.normalize(table, dim=-1) if self.metric == "cosine" else table)
        if self.phi:
            channels = self.widths[0]
            tensors += [0.05 * normal(4, channels, channels, 3, 3, seed=3), 0.05 * normal(4, channels, seed=4)]
        return tensors

    def arguments(self, tensors) -> tuple[torch.Tensor, list[torch.Tensor], dict]:
        """What the ops take, from `inputs`."""
        tables, phi = tensors[1 : 1 + len(self.widths)], tensors[1 + len(self.widths) :]
        options = {"scales": self.scales, "metric": self.metric, **self.options}
        if phi:
            options["phi"] = (*phi, var_expression.RATIO, var_expression.ASSIGNMENT)
        return tensors[0], tables, options

    def words(self, batch: int) -> str:
        widths = " + ".join(map(str, self.widths))
        return f"B {batch}, {batch * sum(s * s for s in self.scales)} rows, K {self.codes}, {widths}"


SIZES = {
    "TokenFlow": Size(16, (1, 2, 4, 6, 8, 10, 12, 14, 16), 32768, (32, 8)),
    "TokenFlow XL": Size(27, (*range(1, 11), 12, 14, 17, 22, 27), 32768, (32, 8)),
    "VAR": Size(16, var_expression.SCALES, 4096, (32,), "l2", {"loss_on": "accumulated"}, phi=True),
}


def tokenflow_loop(features, *tables, scales, training: bool, pixel_weight: float = 1.0):
    """TokenFlow's residual loop around its quantizer, restated: area down, bicubic up, a detached residual."""
    size, residual, total, ids, losses = features.shape[2:], features, 0.0, [], []
    widths = [t.shape[1] for t in tables]
    for s in scales:
        pooled = F.interpolate(residual, size=(s, s), mode="area").permute(0, 2, 3, 1).reshape(-1, sum(widths))
        q, index, loss = tokenflow_quantize(
            *pooled.split(widths, dim=1), *tables, training=training, pixel_weight=pixel_weight
        )
        step = q.view(-1, s, s, sum(widths)).permute(0, 3, 1, 2)
        up = F.interpolate(step, size=size, mode="bicubic")
        total, residual = total + up, residual - up.detach()
        ids.append(index.view(len(features), -1))
        losses.append(loss)
    return total, torch.cat(ids, 1), torch.stack(losses).mean() if training else None


def expression(size: Size, training: bool) -> tuple[str, Callable]:
    """The authors' expression of a size, from `inputs` to (quantized, ids, loss)."""
    if size.phi:
        return VAR, lambda *tensors: var_expression.var_quantize(*tensors, training=training)
    return TOKENFLOW, lambda *tensors: tokenflow_loop(*tensors, scales=size.scales, training=training)


def agreement(size: Size, tensors):
    """A check that follows each rival's own ids: one near-tie changes every later scale of its image."""
    features, tables, options = size.arguments(tensors)

    def check(results):
        quantized, indices, *rest = results["native"]
        for rival, (other_quantized, other_indices, *other_rest) in results.items():
            if rival == "native":
                continue
            rows = ops.multiscale_rows(features, other_indices, tables, **options)
            flat = [p.reshape(-1, p.shape[-1]) for p in rows.split(size.widths, dim=-1)]
            exact = ops.shared_nearest_code(flat, tables, metric=size.metric)
            assert_same_ids(exact, other_indices.flatten(), flat, tables, size.metric)
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


def loop(name: str, batch: int, training: bool) -> Problem:
    """multiscale_quantize against its twin and, as far as its N x K matrices fit, the authors' expression."""
    size = SIZES[name]
    tensors = size.inputs(batch)
    upstream = normal(*tensors[0].shape, seed=9) / tensors[0].numel()

    def step(call):
        if not training:
            with torch.no_grad():
                return tuple(call(*tensors))[:2]
        inputs = [t.detach().requires_grad_() for t in tensors]
        quantized, indices, loss = call(*inputs)
        return quantized, indices, loss, *torch.autograd.grad((quantized, loss), inputs, (upstream, torch.ones(())))

    def by(module):
        def call(*tensors):
            features, tables, options = size.arguments(tensors)
            return module.multiscale_quantize(features, tables, **options)

        return lambda: step(call)

    calls = {"native": by(ops), "twin": by(reference)}
    rival, call = expression(size, training)
    if batch == 1 or size.phi or not training:
        calls[rival] = lambda: step(call)
    way = "forward + backward" if training else "forward"
    return Problem(f"multiscale_quantize, {name}, {way}", size.words(batch), calls, agreement(size, tensors))


def decoder(name: str, batch: int, training: bool) -> Problem:
    """multiscale_decode against its twin, gradients of codebooks and phi included in training."""
    size = SIZES[name]
    tensors = size.inputs(batch)
    length = sum(s * s for s in size.scales)
    ids = torch.randint(size.codes, (batch, length), generator=torch.Generator().manual_seed(3))

    def step(module):
        inputs = [t.detach().requires_grad_(training) for t in tensors]
        _, tables, options = size.arguments(inputs)
        options = {key: value for key, value in options.items() if key != "loss_on"}
        decoded = module.multiscale_decode(ids, tables, size=size.side, **options)
        return decoded, *(torch.autograd.grad(decoded, inputs[1:], tensors[0]) if training else ())

    def check(results):
        for actual, expected in zip(results["native"], results["twin"]):
            assert_close(actual, expected)

    way = "forward + backward" if training else "forward"
    calls = {"native": lambda: step(ops), "twin": lambda: step(reference)}
    return Problem(f"multiscale_decode, {name}, {way}", size.words(batch), calls, check)


PROBLEMS = {
    f"{op}, {name}, {way}, batch {batch}": (make, name, batch, way != "forward")
    for op, make in (("quantize", loop), ("decode", decoder))
    for name in SIZES
    for way in ("forward", "forward + backward")
    for batch in ((1, 4) if name == "TokenFlow XL" else (1, 16))
    if op == "quantize" or way == "forward" or batch > 1
}


def problem(name: str) -> Problem:
    """One of PROBLEMS."""
    make, *arguments = PROBLEMS[name]
    return make(*arguments)


@pytest.mark.parametrize("name", PROBLEMS)
def bench_multiscale(benchmark, name):
    """Faster than either and without their N x K matrices."""
    for row in compare(benchmark, "bench_multiscale", name).values():
        assert row["times_faster"] > 1, row
