"""Results of `pytest --benchmark`: kept in results/latest.csv, shown as a markdown table by `python benchmarks/table.py`."""

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "latest.csv"
KEY = ("op", "size", "provider", "instruction_set")
session: list[dict] = []
skipped: list[tuple] = []


def load(path: Path = RESULTS) -> list[dict]:
    """Rows of the last measurement of every provider; numbers are floats, what was not measured is None."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def store(rows: list[dict], missing: list[tuple]) -> None:
    """Adds rows in the place of older ones of the same op, size, provider and instruction set.

    Args:
        rows: one dict a provider.
        missing: (op, size, provider, why) of those that could not be measured.
    """
    session.extend(rows)
    skipped.extend(missing)
    merged = {tuple(row[k] for k in KEY): row for row in (*load(), *rows)}
    write(list(merged.values()), RESULTS)


def write(rows: list[dict], path: Path) -> None:
    """A CSV file with the columns of the newest row; numbers to six digits."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]), restval="", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})


def instruction_sets(rows: list[dict]) -> list[str]:
    """Those that were measured, the best first."""
    return sorted({r["instruction_set"] for r in rows}, key=("avx512", "avx2", "neon", "baseline").index)


def markdown(rows: list[dict]) -> str:
    """One line a rival, native beside it, and a line of conditions under the table."""
    native = {_problem(row): row for row in rows if row["provider"] == "native"}
    lines = [
        "| op | size | against | native | rival | faster (quartiles) | native memory | rival memory |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        own = native.get(_problem(row))
        if row is own or own is None:
            continue
        lines.append(
            f"| {row['op']} | {row['size']} | {row['provider']} | {time(own['ms'])} | {time(row['ms'])} | "
            f"{row['times_faster']:.3g}x ({row['times_faster_q1']:.3g} to {row['times_faster_q3']:.3g}) | "
            f"{size(own['mb'])} | {size(row['mb'])} |"
        )
    return "\n".join([*lines, "", conditions(rows)])


def conditions(rows: list[dict]) -> str:
    """What the numbers of a table depend on."""
    sets = sorted({row["instruction_set"] for row in rows})
    threads = sorted({int(row["threads"]) for row in rows if row["provider"] == "native"})
    return (
        f"Medians of alternating turns, each provider in its own process; memory is the peak above the inputs. {rows[0]['cpu']}, "
        f"{' and '.join(sets)}, {' or '.join(map(str, threads))} threads; {rows[0]['versions']}; {rows[0]['date']}."
    )


def time(ms: float) -> str:
    """Milliseconds in a unit that suits them."""
    return f"{1e3 * ms:.3g} us" if ms < 0.1 else f"{ms:.3g} ms" if ms < 999.5 else f"{1e-3 * ms:.3g} s"


def size(mb: float) -> str:
    return f"{mb:.0f} MB" if mb >= 100 else f"{mb:.2g} MB"


def _problem(row: dict) -> tuple:
    return row["op"], row["size"], row["instruction_set"]


def _number(text: str):
    try:
        return float(text) if text else None
    except ValueError:
        return text


if __name__ == "__main__":
    rows = load()
    print(markdown(rows) if rows else "No results yet: run `pytest --benchmark` first.")
