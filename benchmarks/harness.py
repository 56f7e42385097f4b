"""How every benchmark measures: agreement first, then native and its rivals in turns, then peak memory, one process each.

`pytest --benchmark` runs bench_*.py. A module gives `problem(name) -> Problem` and calls `compare` on it; results go to
results/latest.csv and to the table at the end of the run (table.py).
"""

import importlib
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import table
import torch

import tokenflow_ext

SECONDS = 3.0  # of timing a problem, shared by all its calls
ROUNDS = (3, 15)


@dataclass
class Problem:
    """One op at one size.

    Attributes:
        op: what is measured, with "forward" or "forward + backward" where both exist.
        size: the shape in words.
        calls: the native call under "native", then those it is measured against; each returns its results.
        check: raises AssertionError unless the results of all calls, by name, agree.
    """

    op: str
    size: str
    calls: dict[str, Callable[[], object]]
    check: Callable[[dict[str, object]], None]


def compare(benchmark, module: str, name: str) -> dict[str, dict]:
    """Checks, times and weighs `problem(name)` of a bench module; returns the table's rows by the rival's name."""
    problem = importlib.import_module(module).problem(name)
    start = time.perf_counter()
    problem.check({provider: call() for provider, call in problem.calls.items()})
    rounds = int(min(max(SECONDS / (time.perf_counter() - start), ROUNDS[0]), ROUNDS[1]))
    seconds: dict[str, list[float]] = {provider: [] for provider in problem.calls}

    def timed(provider: str) -> None:
        start = time.perf_counter()
        problem.calls[provider]()
        seconds[provider].append(time.perf_counter() - start)

    def others() -> None:
        for provider in problem.calls:
            if provider != "native":
                timed(provider)

    benchmark.group = f"{problem.op}, {problem.size}"
    benchmark.pedantic(lambda: timed("native"), setup=others, rounds=rounds, iterations=1)
    medians = {provider: statistics.median(values) for provider, values in seconds.items()}
    del problem.calls
    extra = {provider: extra_bytes(module, name, provider) for provider in medians}
    rows = {}
    for rival in medians:
        if rival != "native":
            rows[rival] = {
                "op": problem.op,
                "size": problem.size,
                "rival": rival,
                "native_ms": 1e3 * medians["native"],
                "rival_ms": 1e3 * medians[rival],
                "times_faster": medians[rival] / medians["native"],
                "native_mb": extra["native"] / 2**20,
                "rival_mb": extra[rival] / 2**20,
                "times_less_memory": extra[rival] / max(extra["native"], 2**16),
                "rounds": rounds,
                **conditions(),
            }
            benchmark.extra_info[f"times faster than {rival}"] = round(rows[rival]["times_faster"], 2)
    table.store(list(rows.values()))
    return rows


def conditions() -> dict:
    """What the numbers depend on besides the code."""
    info = tokenflow_ext.build_info()
    return {"threads": torch.get_num_threads(), "instruction_set": info["instruction_set"], "torch": info["torch"]}


def extra_bytes(module: str, name: str, provider: str) -> int:
    """Peak memory of one call above its inputs, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__)), module, name, provider]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def _status(field: str) -> int:
    """A field of this process's memory, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _weigh(call: Callable[[], object]) -> int:
    """Peak resident bytes during call() above those before it.

    Linux forgets its high-water mark on request; elsewhere the mark before the call stands in for the bytes in use.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def assert_same_ids(actual, expected, xs, codebooks, metric: str, weights=None) -> torch.Tensor:
    """Rows [N] whose ids are equal; the others have to be certified near-ties and are counted.

    A near-tie is a gap of the two codes' float64 distances under the float32 rounding of the expanded squares
    |x|^2 + |c|^2 - 2 x.c that the rivals compute.

    Args:
        actual: ids [N].
        expected: ids [N].
        xs: T tensors [N, D_t].
        codebooks: T tables [K, D_t].
        metric: "cosine", "l2" or "dot".
        weights: T numbers, 1 each by default.
    """
    equal = actual == expected
    rows = (~equal).nonzero()[:, 0]
    gap, size = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    for x, codebook, weight in zip(xs, codebooks, weights or [1.0] * len(xs)):
        x, a, b = x[rows].double(), codebook[actual[rows]].double(), codebook[expected[rows]].double()
        if metric == "cosine":
            x, a, b = (v / v.norm(dim=-1, keepdim=True).clamp_min(1e-12) for v in (x, a, b))
        if metric != "dot":
            gap += weight * (a.square() - b.square()).sum(-1)
        gap -= 2 * weight * (x * (a - b)).sum(-1)
        size += weight * (x.square() + a.square() + b.square()).sum(-1) * (len(x.T) + 8)
    assert (gap.abs() <= 4 * 2.0**-24 * size).all(), f"{len(rows)} ids differ, not all of them near-ties"
    print(f"  {len(equal)} ids agree but for {len(rows)} certified near-ties")
    return equal


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """max|actual - expected| <= tolerance max|expected|."""
    actual, expected = actual.detach(), expected.detach()
    error, size = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= tolerance * size, f"error {error:.3g} of {size:.3g}"


def normal(*shape: int, seed: int) -> torch.Tensor:
    """float32 standard normals of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _warm_up() -> None:
    """What the libraries allocate once is not the op's: `torch.autograd.grad` alone imports 34 MB of symbolic algebra."""
    x, codebook = torch.ones(4, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    for module in (tokenflow_ext.ops, tokenflow_ext.reference):
        out = module.quantize(x, codebook)
        torch.autograd.grad((out.quantized, out.loss), (x, codebook), (torch.ones(4, 2), torch.ones(())))
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))


if __name__ == "__main__":
    module, name, provider = sys.argv[1:]
    _warm_up()
    print(_weigh(importlib.import_module(module).problem(name).calls[provider]))
