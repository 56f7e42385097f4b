"""The pictures of a run, for people who would rather look than read: docs/roofline.png and docs/scaling.png.

Left of the roofline: search against the width of a code, under the peaks of the arithmetic units and under what any
method can reach that writes and reads an N x K matrix once. Right: ops that move memory, against copying.
"""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

INK, GREY = "#24292f", "#8b949e"
COLOURS = {
    "native": "#0a6e8a",
    "native, float32": "#4cb5c9",
    "FAISS": "#d1742f",
    "matrix product": "#a06cb5",
    "twin": "#b7bec7",
}
LABELS = {
    "native": "certified int8 scan, float32 ids (default)",
    "native, float32": "float32 scan",
    "FAISS": "FAISS IndexFlatL2",
    "matrix product": "torch.mm alone, no argmin",
}
STYLE = {
    "font.size": 10.5, "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 12, "figure.facecolor": "white",
}  # fmt: skip


def write(sets: list[list[dict]], folder: Path) -> list[Path]:
    """Writes each picture from the first set of rows that suffices for it; returns their paths."""
    written = []
    with plt.rc_context(STYLE):
        for name, draw in (("roofline", _roofline), ("scaling", _scaling)):
            figure = next((drawn for rows in sets if (drawn := draw(rows)) is not None), None)
            if figure is not None:
                figure.savefig(folder / f"{name}.png", dpi=140, bbox_inches="tight")
                plt.close(figure)
                written.append(folder / f"{name}.png")
    return written


def _roofline(rows: list[dict]):
    searches = [r for r in rows if r["op"] == "search by width"]
    movers = [r for r in rows if r["provider"] in ("native", "twin", "F.normalize") and r["gbs"]]
    movers = [r for r in movers if r["op"].startswith(("lookup", "code_statistics", "ema_update_", "normalize_rows"))]
    if not searches or not movers:
        return None
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 6.4), gridspec_kw={"width_ratios": [1.15, 1], "wspace": 0.78}
    )
    _search_by_width(left, searches)
    _bandwidth(right, movers)
    return figure


def _search_by_width(axes: Axes, rows: list[dict]) -> None:
    width = {id(r): int(r["size"].split(":")[0].removeprefix("D ")) for r in rows}
    widths = sorted(set(width.values()))
    ours = [r for r in rows if r["provider"] == "native"]
    for provider, label in LABELS.items():
        line = sorted((width[id(r)], r["gflops"]) for r in rows if r["provider"] == provider)
        if line:
            bold = 2.6 if provider.startswith("native") else 1.8
            axes.plot(*zip(*line), "o-", color=COLOURS[provider], linewidth=bold, markersize=6, label=label)
    peaks = {"fma_gflops": "float32 FMA peak", "int8_gops": "8-bit dot-product peak"}
    for field, label in peaks.items():
        height = max(r[field] or 0 for r in ours)
        if height:
            axes.axhline(height, color=INK, linewidth=1.2, linestyle="--" if field == "fma_gflops" else ":")
            axes.text(widths[0], height * 1.04, f"{label}, {height:.0f}", va="bottom", fontsize=9.5)
    copy = statistics.median(r["copy_gbs"] for r in ours)
    bound = [2 * d * copy / 8 for d in widths]
    axes.plot(widths, bound, color=GREY, linewidth=1.2, linestyle="-.")
    axes.annotate(
        f"storing N x K and reading it back, {copy:.0f} GB/s", (widths[0], bound[0]), (8, -13),
        textcoords="offset points", color=GREY, fontsize=9.5,
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="width of a code D", ylabel="multiply-adds x 2 a second, 10$^9$")
    axes.set_xticks(widths, [str(d) for d in widths])
    axes.minorticks_off()
    axes.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])
    axes.set_ylim(8, 1.35 * max(max(r["int8_gops"] or 0, r["fma_gflops"]) for r in ours))
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=9.5)
    axes.set_title("Search: how much of the processor is used")


def _bandwidth(axes: Axes, rows: list[dict]) -> None:
    native = [r for r in rows if r["provider"] == "native"]
    twins = {(r["op"], r["size"]): r for r in rows if r["provider"] != "native"}
    native.sort(key=lambda r: (r["op"], r["size"]), reverse=True)
    for y, row in enumerate(native):
        twin = twins.get((row["op"], row["size"]))
        axes.barh(y + 0.19, row["gbs"], 0.38, color=COLOURS["native"], label="native" if y == 0 else None)
        if twin:
            axes.barh(y - 0.19, twin["gbs"], 0.38, color=COLOURS["twin"], label="PyTorch twin" if y == 0 else None)
    copy = statistics.median(r["copy_gbs"] for r in native)
    axes.axvline(copy, color=INK, linewidth=1.2, linestyle="--")
    axes.text(copy, len(native) - 0.35, f" copying 256 MB: {copy:.0f}", fontsize=9.5)
    axes.set_yticks(range(len(native)), [f"{r['op']}: {r['size'].split(':')[0]}" for r in native], fontsize=8.5)
    axes.set_xlabel("compulsory bytes a second, GB/s")
    axes.set_ylim(-0.6, len(native) + 0.3)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=9.5)
    axes.set_title("Ops that move memory")


def _scaling(rows: list[dict]):
    if not all(any(r["op"] == f"linear in {letter}" for r in rows) for letter in "NK"):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), gridspec_kw={"wspace": 0.25})
    fixed = {"N": "K 32768, D 8", "K": "N 16384, D 8"}
    for panel, letter in zip(axes, "NK"):
        points = sorted((int(r["size"].split()[1]), r["ms"]) for r in rows if r["op"] == f"linear in {letter}")
        panel.plot(*zip(*points), "o-", color=COLOURS["native"], linewidth=2.4, markersize=6, label="measured")
        last, ms = points[-1]
        panel.plot(
            [n for n, _ in points], [ms * n / last for n, _ in points], color=GREY, linestyle="--",
            label=f"{1e6 * ms / last:.0f} ns each",
        )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel=letter, ylabel="ms")
        panel.set_xticks([n for n, _ in points], [f"{n // 1024}k" for n, _ in points])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(color="#e6e9ec", linewidth=0.8)
        panel.legend(frameon=False)
        panel.set_title(f"Cost against {letter} ({fixed[letter]}, {rows[0]['instruction_set']})")
    return figure
