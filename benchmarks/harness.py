"""How every benchmark measures: each provider in a process of its own, agreement first, then native and its rivals in turns.

`pytest --benchmark` runs bench_*.py. A module gives `problem(name) -> Problem` and calls `compare` on it; results go to
results/latest.csv and to the table at the end of the run (table.py). A turn is a few calls back to back; before each,
everybody's threads have gone to sleep (worker.py), and a ratio is that of two neighbouring turns.
"""

import importlib
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import table
import torch
from agreement import assert_close, assert_same_ids
from worker import Missing, Worker

__all__ = ["Problem", "assert_close", "assert_same_ids", "compare", "normal"]

SECONDS = 0.8  # of turns for each provider
TURN = 0.02  # seconds at least, by repeating short calls
ROUNDS = (3, 11)
SLOW = 2.5  # seconds of a call that gets two rounds only


@dataclass
class Problem:
    """One op at one size.

    Attributes:
        op: what is measured, with "forward" or "forward + backward" where both exist.
        size: the shape in words.
        calls: the native call under "native", then those it is measured against; each returns its results. One that
            raises ImportError when it is first called is reported as skipped.
        check: raises AssertionError unless the results of all calls, by name, agree.
        flop: arithmetic that the op cannot do without, operations.
        bytes: memory that the op cannot do without reading or writing.
        keeps_memory: freed memory stays with the process, as with a caching allocator; for ops that only move memory,
            whose large results would otherwise cost more in page faults than in the op.
    """

    op: str
    size: str
    calls: dict[str, Callable[[], object]]
    check: Callable[[dict[str, object]], None]
    flop: float = 0
    bytes: float = 0
    keeps_memory: bool = False


def compare(benchmark, module: str, name: str) -> dict[str, dict]:
    """Checks, times and weighs `problem(name)` of a bench module; returns the table's rows by the rival's name."""
    problem = importlib.import_module(module).problem(name)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers, skipped = {}, {}
        for provider in problem.calls:
            worker = stack.enter_context(Worker(module, name, provider))
            try:
                worker.first(folder / "results.pt")
                workers[provider] = worker
                worker.results = torch.load(folder / "results.pt", weights_only=False)
            except Missing as missing:
                skipped[provider] = str(missing)
        problem.check({provider: worker.results for provider, worker in workers.items()})
        turns = _take_turns(benchmark, workers)
        rows = [_row(problem, provider, workers, turns) for provider in workers]
    table.store(rows, [(problem.op, problem.size, provider, why) for provider, why in skipped.items()])
    benchmark.group = problem.op
    benchmark.extra_info.update({f"times faster than {r['provider']}": r["times_faster"] for r in rows[1:]})
    benchmark.extra_info.update({f"skipped {provider}": why for provider, why in skipped.items()})
    return {row["provider"]: row for row in rows if row["provider"] != "native"}


class Clock:
    """The time that the native worker spent in its calls: pytest-benchmark's timer, so that it reports those."""

    seconds = 0.0

    @classmethod
    def read(cls) -> float:
        return cls.seconds


def _take_turns(benchmark, workers: dict[str, Worker]) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds a call of each turn, by provider; turn i of a rival stands beside turn i of native."""
    turns = {provider: [] for provider in workers}
    rounds = {}
    for provider, worker in workers.items():
        worker.repeat = max(1, min(2000, int(TURN / worker.estimate())))
        seconds = worker.seconds * worker.repeat
        rounds[provider] = 2 if seconds > SLOW else int(min(max(SECONDS / seconds, ROUNDS[0]), ROUNDS[1]))
    rivals = [provider for provider in workers if provider != "native"]

    def setup():
        rivals.reverse()
        for provider in rivals:
            if len(turns[provider]) < rounds[provider]:
                turns[provider].append(workers[provider].turn())

    def native():
        turns["native"].append(workers["native"].turn())
        Clock.seconds += turns["native"][-1][0]

    benchmark.pedantic(native, setup=setup, rounds=max(rounds.values()), iterations=1)
    return turns


def _row(problem: Problem, provider: str, workers: dict[str, Worker], turns: dict) -> dict:
    """A line of the results: this provider at this size, and how many times native is faster and smaller."""
    worker, native = workers[provider], workers["native"]
    wall, cpu = (statistics.median(values) for values in zip(*turns[provider]))
    ratios = [rival[0] / own[0] for rival, own in zip(turns[provider], turns["native"])]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    gflops, gbs = 1e-9 * problem.flop / wall, 1e-9 * problem.bytes / wall
    facts = worker.facts(native=provider.startswith("native"))
    return {
        "op": problem.op,
        "size": problem.size,
        "provider": provider,
        "ms": 1e3 * wall,
        "cpu_ms": 1e3 * cpu,
        "times_faster": quartiles[1],
        "times_faster_q1": quartiles[0],
        "times_faster_q3": quartiles[2],
        "mb": worker.memory / 2**20,
        "times_less_memory": worker.memory / max(native.memory, 2**16),
        "rounds": len(turns[provider]),
        "calls_a_round": worker.repeat,
        "gflops": gflops,
        "gbs": gbs,
        "share_of_fma": gflops / facts["fma_gflops"] if facts["fma_gflops"] else "",
        "share_of_copy": gbs / facts["copy_gbs"] if facts["copy_gbs"] else "",
        **facts,
    }


def normal(*shape: int, seed: int) -> torch.Tensor:
    """float32 standard normals of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
