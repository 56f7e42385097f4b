"""Results of `pytest --benchmark` as a markdown table: `python benchmarks/table.py`."""

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "latest.csv"
KEY = ("op", "size", "rival")
session: list[dict] = []


def load() -> list[dict]:
    """Rows of the last measurement of every problem."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def store(rows: list[dict]) -> None:
    """Adds rows, in the place of older ones of the same op, size and rival."""
    session.extend(rows)
    merged = {tuple(row[k] for k in KEY): row for row in (*load(), *rows)}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(merged.values())


def markdown(rows: list[dict]) -> str:
    """One line a comparison, and a line of conditions under the table."""
    lines = [
        "| op | size | against | native | rival | faster | native memory | rival memory | less memory |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        n = {key: float(row[key]) for key in row if key.endswith(("_ms", "_mb")) or key.startswith("times")}
        lines.append(
            f"| {row['op']} | {row['size']} | {row['rival']} | {n['native_ms']:.3g} ms | {n['rival_ms']:.3g} ms | "
            f"{n['times_faster']:.1f}x | {n['native_mb']:.1f} MB | {n['rival_mb']:.1f} MB | {n['times_less_memory']:.1f}x |"
        )
    conditions = sorted({f"{r['threads']} threads, {r['instruction_set']}, torch {r['torch']}" for r in rows})
    return "\n".join(
        [*lines, "", f"Medians of alternating runs; memory is the peak above the inputs. {'; '.join(conditions)}."]
    )


if __name__ == "__main__":
    rows = load()
    print(markdown(rows) if rows else "No results yet: run `pytest --benchmark` first.")
