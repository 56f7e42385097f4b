"""What was promised against what was measured: `python benchmarks/goals.py [instruction set]`, from results/latest.csv.

A goal is accepted at 0.85 of its number (a median of paired turns). What no row of the results says is not met.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import table

ACCEPTED = 0.85
A, C, D, E = "A, TokenFlow's pixel table:", "C, UniTok:", "D, wide VAR:", "E, VQGAN:"
LOOP, VAR = "multiscale_quantize, TokenFlow, forward", "multiscale_quantize, VAR, forward"
EXPRESSION, LUCIDRAINS, EAGER = "TokenFlow's expression", "vector-quantize-pytorch", "eager transcription"
MOVERS = ("lookup, forward", "lookup, forward + backward", "code_statistics", "ema_update_")


@dataclass
class Goal:
    """A number to reach: at least, or at most where `most` says so."""

    claim: str
    number: float
    unit: str
    measured: Callable[[list[dict]], float | None]
    accepted: float = ACCEPTED
    most: bool = False

    @property
    def limit(self) -> float:
        return self.number / self.accepted if self.most else self.number * self.accepted

    def met(self, value: float | None) -> bool:
        return value is not None and (value <= self.limit if self.most else value >= self.limit)


def rows_of(rows: list[dict], op: str, size: str = "", provider: str = "native") -> list[dict]:
    """Rows of an op, and of sizes and providers that begin so."""
    return [r for r in rows if r["op"] == op and r["size"].startswith(size) and r["provider"].startswith(provider)]


def value(field: str, op: str, size: str = "", provider: str = "native", best=min) -> Callable:
    """The worst (or best) of a field over the rows that match; None without any."""

    def measured(rows):
        values = [r[field] for r in rows_of(rows, op, size, provider) if r[field] is not None]
        return best(values) if values else None

    return measured


def faster(op: str, size: str, provider: str) -> Callable:
    return value("times_faster", op, size, provider)


def linearity(letter: str) -> Callable:
    """R^2 of the least-squares line of milliseconds over N or K."""

    def measured(rows):
        points = [(float(r["size"].split()[1]), r["ms"]) for r in rows_of(rows, f"linear in {letter}")]
        return statistics.correlation(*zip(*points)) ** 2 if len(points) > 2 else None

    return measured


def behind_twin(rows: list[dict]) -> list[dict]:
    """Rows of twins that are faster than native: by more than 10 us where they take less than 50 us, else at all."""
    native = {(r["op"], r["size"]): r["ms"] for r in rows if r["provider"] == "native"}
    allowed = {True: 0.010, False: 0.0}
    twins = [r for r in rows if r["provider"] in ("twin", "F.normalize") and (r["op"], r["size"]) in native]
    return [r for r in twins if native[r["op"], r["size"]] - r["ms"] > allowed[r["ms"] < 0.050]]


GOALS = [
    Goal("search vs FAISS L2, D 8, K 32768", 2, "x", faster("nearest_code", A, "FAISS")),
    Goal("search vs FAISS L2, 8 groups x 4096 x 8", 1.6, "x", faster("nearest_code", C, "FAISS")),
    Goal("search vs FAISS L2, D 32", 3, "x", faster("nearest_code", D, "FAISS")),
    Goal("search vs FAISS L2, D 40 (32 + 8)", 6, "x", faster("shared_nearest_code", "B1", "FAISS")),
    Goal("search vs FAISS L2, D 72 (64 + 8)", 6, "x", faster("shared_nearest_code", "B2", "FAISS")),
    Goal("search vs FAISS L2, D 256", 5, "x", faster("nearest_code", E, "FAISS")),
    Goal("search vs FAISS, cosine, D 8", 5, "x", faster("nearest_code", "A, cosine", "FAISS")),
    Goal("search vs FAISS, dot, D 8", 5, "x", faster("nearest_code", "A, dot", "FAISS")),
    Goal("search vs FAISS L2, N x D < 128000", 30, "x", faster("nearest_code", "below FAISS", "FAISS")),
    Goal("search vs FAISS L2, N 4096, D 8", 30, "x", faster("nearest_code", "far below FAISS", "FAISS")),
    Goal("TokenFlow's quantizer, 16384 x 32768: time", 100, "x", faster("shared_quantize, forward", "64 images", EXPRESSION)),
    Goal(
        "TokenFlow's quantizer, 16384 x 32768: memory", 400, "x",
        value("times_less_memory", "shared_quantize, forward", "64 images", EXPRESSION),
    ),
    Goal("TokenFlow's multi-scale forward, batch 16", 40, "x", faster(LOOP, "B 16", EXPRESSION)),
    Goal("VAR's multi-scale forward, batch 16", 4, "x", faster(VAR, "B 16", "VAR's expression")),
    Goal("training step vs vector-quantize-pytorch: time", 100, "x", faster("training step", "TokenFlow", LUCIDRAINS)),
    Goal(
        "training step vs vector-quantize-pytorch: memory", 100, "x",
        value("times_less_memory", "training step", "TokenFlow", LUCIDRAINS),
    ),
    Goal("entropy loss, forward + backward, N 4096, K 32768", 10, "x", faster("entropy_loss, forward + backward", "pixel half", "twin")),
    Goal("TokenFlow-B encodes at 224: against the layer-by-layer transcription", 1.5, "x", faster("model: encode", "tokenflow-b", EAGER)),
    Goal("tokenflow-tiny's training step against the transcription", 1.5, "x", faster("model: training step", "tokenflow-tiny", EAGER)),
    *(Goal(f"{op}: share of the copy bandwidth, least", 60, "%", share) for op, share in (
        (op, lambda rows, op=op: percent(value("share_of_copy", op)(rows))) for op in MOVERS
    )),
    Goal("two threads over one, A", 1.85, "x", faster("threads", "A", "native, 1 thread")),
    Goal("two threads over one, D", 1.85, "x", faster("threads", "D", "native, 1 thread")),
    Goal("two threads over one, E", 1.85, "x", faster("threads", "E", "native, 1 thread")),
    Goal("cost linear in N: R^2", 0.99, "", linearity("N"), accepted=1),
    Goal("cost linear in K: R^2", 0.99, "", linearity("K"), accepted=1),
    Goal(
        "sizes where the twin is faster (by 10 us below 50 us)", 0, "",
        lambda rows: len(behind_twin(rows)) if rows else None, accepted=1, most=True,
    ),
    Goal(
        "call overhead, N 1, K 1024, D 8", 12, "us", most=True,
        measured=lambda rows: microseconds(value("ms", "overhead, nearest_code")(rows)),
    ),
    Goal(
        "float32 search, D 8 .. 256: share of the FMA peak, least", 85, "%",
        lambda rows: percent(value("share_of_fma", "search by width", "", "native, float32")(rows)), accepted=1,
    ),
]  # fmt: skip


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def microseconds(ms: float | None) -> float | None:
    return None if ms is None else 1e3 * ms


def markdown(rows: list[dict]) -> str:
    """The table of goals, and the rows in which a twin is ahead."""
    lines = ["| claim | goal | accepted | measured | |", "|---|---:|---:|---:|---|"]
    for goal in GOALS:
        measured = goal.measured(rows)
        shown = "not measured" if measured is None else f"{measured:.3g} {goal.unit}"
        sign = "<=" if goal.most else ">="
        numbers = f"{sign} {goal.number:g} {goal.unit} | {sign} {goal.limit:.3g} | {shown}"
        lines.append(f"| {goal.claim} | {numbers} | {'met' if goal.met(measured) else '**not met**'} |")
    lines += [f"\nThe twin is ahead: {r['op']}, {r['size']}: {table.time(r['ms'])}" for r in behind_twin(rows)]
    return "\n".join([*lines, "", table.conditions(rows)])


if __name__ == "__main__":
    found = table.load()
    wanted = (
        sys.argv[1:]
        or sorted({r["instruction_set"] for r in found}, key=("baseline avx2 neon avx512".split()).index)[-1:]
    )
    rows = [r for r in found if r["instruction_set"] in wanted]
    print(markdown(rows) if rows else "No results yet: run `pytest --benchmark` first.")
