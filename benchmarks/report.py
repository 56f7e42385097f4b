"""One command after `pytest --benchmark`: README's table, the pictures in docs/, the goals, and the numbers they quote.

`python benchmarks/report.py` reads results/latest.csv, puts its rows into measured.csv in the place of all older ones of the same
instruction set (another machine's stay), and replaces what stands between the markers in README.md; run twice it changes
nothing. `--measured` starts from measured.csv.
"""

import argparse
import re
from pathlib import Path

import goals
import table

ROOT = Path(__file__).parent.parent
MEASURED = Path(__file__).parent / "measured.csv"
BEGIN, END = "<!-- measured: benchmarks/report.py -->", "<!-- /measured -->"
QUOTED = (  # op, and size as it begins
    ("nearest_code", "A, TokenFlow's pixel table"),
    ("nearest_code", "A, cosine"),
    ("nearest_code", "C, UniTok:"),
    ("nearest_code", "D, wide VAR"),
    ("nearest_code", "E, VQGAN"),
    ("nearest_code", "far below FAISS"),
    ("nearest_code", "1 row"),
    ("shared_nearest_code", "B1"),
    ("shared_quantize, forward", "64 images"),
    ("shared_quantize, forward + backward", "16 images"),
    ("multiscale_quantize, TokenFlow, forward", ""),
    ("multiscale_quantize, TokenFlow, forward + backward", ""),
    ("multiscale_quantize, VAR, forward", ""),
    ("training step", "TokenFlow's pixel table, EMA"),
    ("entropy_loss, forward + backward", ""),
    ("soft_quantize, forward + backward", ""),
    ("lookup, forward", "VAR"),
    ("code_statistics", "VQGAN"),
    ("ema_update_", "VQGAN"),
    ("overhead, nearest_code", ""),
    ("model: encode", ""),
    ("model: reconstruct", ""),
    ("model: training step", ""),
)


def readme_table(rows: list[dict]) -> str:
    """The quoted comparisons: every rival at those sizes, ties in bold."""
    lines = [
        "| op | size | against | native | rival | faster | native memory | rival memory |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    native = {(r["op"], r["size"]): r for r in rows if r["provider"] == "native"}
    chosen = {id(r): r for op, size in QUOTED for r in rows if r["op"] == op and r["size"].startswith(size)}
    last = None
    for row in chosen.values():
        problem = row["op"], row["size"]
        if row["provider"].startswith("native") or problem not in native:
            continue
        own = native[problem]
        first = f"{row['op']} | {row['size']}" if problem != last else " | "
        times = f"{row['times_faster']:.3g}x"
        lines.append(
            f"| {first} | {row['provider']} | {table.time(own['ms'])} | {table.time(row['ms'])} | "
            f"{times if row['times_faster'] >= 2 else f'**{times}**'} | {table.size(own['mb'])} | {table.size(row['mb'])} |"
        )
        last = problem
    return "\n".join([*lines, "", table.conditions(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", action="store_true", help="from measured.csv instead of results/latest.csv")
    latest = [] if parser.parse_args().measured else table.load(table.RESULTS)
    again = {r["instruction_set"] for r in latest}
    rows = [r for r in table.load(MEASURED) if r["instruction_set"] not in again] + latest
    if not rows:
        raise SystemExit("No results yet: run `pytest --benchmark` first.")
    table.write(rows, MEASURED)
    # The best instruction set first: its pictures too.
    sets = {name: [r for r in rows if r["instruction_set"] == name] for name in table.instruction_sets(rows)}
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md: wanted the lines {BEGIN} and {END} around the table, found none")
    between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    tables = "\n\n".join(map(readme_table, sets.values()))
    readme.write_text(between.sub(lambda _: f"{BEGIN}\n{tables}\n{END}", text))
    try:
        import plots

        print("wrote", *plots.write(list(sets.values()), ROOT / "docs"))
    except ImportError as error:
        print(f"no pictures: {error}; `pip install '.[bench]'`")
    print(*map(goals.markdown, sets.values()), sep="\n\n")


if __name__ == "__main__":
    main()
