"""Ours against PyTorch at the shapes of benchmarks/: milliseconds by CUDA events, peak memory, share of the card's peak.

A rival that fails or does not fit is told and fails nothing; where its ids differ from ours, rows have to be near-ties.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from gpu_check.place import Gpu
from gpu_check.plan import ROOT

from tokenflow_ext import ops

sys.path.insert(0, str(ROOT / "benchmarks"))  # whose harness is not the tests'
import bench_multiscale  # noqa: E402
import bench_nearest_code  # noqa: E402
import bench_shared_quantize  # noqa: E402
from agreement import assert_same_ids  # noqa: E402
from harness import normal  # noqa: E402
from tokenflow_expression import distances, tokenflow_quantize  # noqa: E402

FP32_LANES = {(8, 0): 64, (8, 6): 128, (8, 7): 128, (8, 9): 128, (9, 0): 128, (10, 0): 128, (10, 3): 128, (12, 0): 128}
"""Fused multiply-adds a multiprocessor and clock. Source: CUDA C++ Programming Guide, arithmetic instructions."""


@dataclass
class Work:
    """`calls` by name, ours first; what ours cannot do without; how ids are compared, where they are."""

    calls: dict[str, Callable[[], object]]
    flop: float = 0
    bytes: float = 0
    same: Callable[[object, object], None] | None = None


def lookup(place: Gpu, rows: int, codes: int, width: int) -> Work:
    table = normal(codes, width, seed=1).to(place.device)
    ids = torch.randint(codes, (rows,), generator=torch.Generator().manual_seed(2)).to(place.device)
    calls = {"ours": lambda: ops.lookup(ids, table, backend=place.backend), "table[ids]": lambda: table[ids]}
    calls["compiled"] = torch.compile(lambda: table[ids], backend=place.compiler)
    return Work(calls, bytes=rows * (8 + 4 * width) + 4 * width * min(rows, codes))


def each_group(call: Callable) -> Callable:
    """For x [N, G, D] and codebook [G, K, D] too."""
    return lambda x, c: call(x, c) if x.dim() == 2 else torch.stack([call(*p) for p in zip(x.unbind(1), c)], 1)


def search(place: Gpu, rows: int, groups: int, codes: int, width: int, metric: str) -> Work:
    shape = (groups,) if groups else ()
    x, codebook = (normal(*s, width, seed=i) for i, s in enumerate([(rows, *shape), (*shape, codes)]))
    here = x, codebook
    x, codebook = x.to(place.device), codebook.to(place.device)
    unit = (lambda v: F.normalize(v, dim=-1)) if metric == "cosine" else lambda v: v
    if metric == "dot":
        eager = each_group(lambda x, c: (x @ c.T).argmax(1))
    else:
        eager = each_group(lambda x, c: distances(unit(x), unit(c)).argmin(1))
    if metric == "dot":
        half = torch.zeros(codebook.shape[:-1], device=place.device)
    else:
        half = 0.5 * unit(codebook).square().sum(-1)
    codes_ready = unit(codebook)  # for the matrix product everything that can be ready is

    def product():
        if not groups:
            return torch.addmm(half, unit(x), codes_ready.T, alpha=-1).argmin(1)
        return torch.stack([torch.addmm(h, unit(r), c.T, alpha=-1).argmin(1)
                            for h, r, c in zip(half, x.unbind(1), codes_ready)], 1)  # fmt: skip

    calls = {
        "ours": lambda: ops.nearest_code(x, codebook, metric=metric, backend=place.backend),
        "expression": lambda: eager(x, codebook),
        "compiled": torch.compile(lambda: eager(x, codebook), backend=place.compiler),
        "cuBLAS + argmin": product,
    }
    if metric != "dot":
        calls["cdist + argmin"] = lambda: each_group(lambda r, c: torch.cdist(r, c).argmin(1))(unit(x), codes_ready)

    def same(ours, other):
        for g in range(groups or 1):
            a, b = (ids.reshape(rows, -1)[:, g].cpu() for ids in (ours, other))
            r, c = (here[0][:, g], here[1][g]) if groups else here
            assert_same_ids(a, b, [r], [c], metric)

    pairs = rows * (groups or 1)
    return Work(calls, 2 * pairs * codes * width, 4 * width * (pairs + codes * (groups or 1)) + 8 * pairs, same)


def steps(inputs, by: dict[str, Callable], training: bool) -> dict[str, Callable]:
    """Calls of functions from inputs to (quantized, ids, loss): forward, or gradients of all inputs as well."""

    def step(call):
        if not training:
            with torch.no_grad():
                return tuple(call(*inputs))[:2]
        leaves = [t.detach().requires_grad_() for t in inputs]
        quantized, _, loss = call(*leaves)
        return torch.autograd.grad(quantized.sum() + loss, leaves)

    return {name: lambda call=call: step(call) for name, call in by.items()}


def quantize(place: Gpu, rows: int, codes: int, training: bool) -> Work:
    """TokenFlow's quantizer on two tables."""
    widths = bench_shared_quantize.WIDTHS
    xs = [normal(rows, w, seed=w).to(place.device) for w in widths]
    tables = [F.normalize(normal(codes, w, seed=w + 1), dim=-1).to(place.device) for w in widths]

    def ours(*t):
        out = ops.shared_quantize(t[:2], t[2:], backend=place.backend)
        return torch.cat(out.quantized, -1), out.indices, out.loss

    def expression(*t):
        return tokenflow_quantize(*t, training=training)

    by = {"ours": ours, "expression": expression, "compiled": torch.compile(expression, backend=place.compiler)}
    return Work(steps([*xs, *tables], by, training), flop=2 * rows * codes * sum(widths))


def multiscale(place: Gpu, size, batch: int) -> Work:
    inputs = [t.to(place.device) for t in size.inputs(batch)]
    _, expression = bench_multiscale.expression(size, training=True)

    def ours(*tensors):
        features, tables, options = size.arguments(tensors)
        return ops.multiscale_quantize(features, tables, **options, backend=place.backend)

    by = {"ours": ours, "expression": expression, "compiled": torch.compile(expression, backend=place.compiler)}
    rows = batch * sum(s * s for s in size.scales)
    return Work(steps(inputs, by, training=True), flop=2 * rows * size.codes * sum(size.widths))


def work(place: Gpu, shape: str) -> Work:
    """One of gpu_check.plan.SHAPES; small in the rehearsal."""
    small = place.name == "emulated"
    kind, name = shape.split(", ", 1)
    limit = (lambda n, most: min(n, most)) if small else lambda n, most: n
    if kind == "lookup":
        return lookup(place, limit(16384, 50), limit(32768, 60), 8)
    if kind == "search":
        rows, groups, codes, width, metric, _ = bench_nearest_code.SIZES[name]
        return search(place, limit(rows, 40), groups, limit(codes, 90), width, metric)
    if kind in ("quantize", "training"):
        rows = {"1 image": 256, "16 images": 4096}[name]
        return quantize(place, limit(rows, 20), limit(bench_shared_quantize.CODES, 50), kind == "training")
    size = bench_multiscale.SIZES[name]
    if small:
        size = replace(size, codes=20, scales=size.scales[:2])
    return multiscale(place, size, limit(16, 1))


def measured(place: Gpu, shape: str) -> str:
    """Ours, its rivals, and how near ours is to the card."""
    made = work(place, shape)
    ours, told = None, []
    for name, call in made.calls.items():
        try:
            result = call()
            call()
            milliseconds, peak = statistics.median(place.milliseconds(call)), place.peak_bytes(call)
        except Exception as error:  # what a rival cannot do is no fault of ours
            if name == "ours":
                raise
            told.append(f"{name} failed: {type(error).__name__}")
            print(f"{name}: {error}")
            continue
        if name == "ours":
            ours, wanted = milliseconds, result
            told.append(f"ours {ours:.3f} ms {peak / 2**20:.0f} MB{share(place, made, ours)}")
            continue
        told.append(f"{name} {milliseconds:.3f} ms {peak / 2**20:.0f} MB, {milliseconds / ours:.1f}x")
        if made.same:
            made.same(wanted, result)
        del result
    return "; ".join(told)


def share(place: Gpu, made: Work, milliseconds: float) -> str:
    """Of the FP32 peak and of the bandwidth, where the driver tells what they are made of."""
    p, words = place.properties(), []
    clock, memory = getattr(p, "clock_rate", 0), getattr(p, "memory_clock_rate", 0) * getattr(p, "memory_bus_width", 0)
    peak = 2e3 * FP32_LANES.get((p.major, p.minor), 0) * p.multi_processor_count * clock
    bandwidth = 2e3 * memory / 8
    if made.flop and peak:
        words.append(f"{1e5 * made.flop / milliseconds / peak:.0f} % of {peak / 1e12:.1f} TFLOP/s")
    if made.bytes and bandwidth:
        words.append(f"{1e5 * made.bytes / milliseconds / bandwidth:.0f} % of {bandwidth / 1e9:.0f} GB/s")
    return f" ({', '.join(words)})" if words else ""
