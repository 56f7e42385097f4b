"""What the pictures have in common: colours, style, arrows, cells, circles and small landscapes."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle, Polygon

INK, GREY, PALE = "#24292f", "#8b949e", "#d7dce1"
TEAL, ORANGE, PURPLE = "#0a6e8a", "#d1742f", "#8a5aa3"
CELLS = ["#dcebef", "#f9e8db", "#ece3f0", "#e3eedd", "#f6e3e6", "#e6e8f4", "#f4efd8", "#e0f0ea"]
"""Fills that stand for codes, light enough to write on."""
STYLE = {
    "font.size": 9.5, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 10, "axes.titlepad": 8,
    "figure.facecolor": "white", "savefig.facecolor": "white", "svg.fonttype": "none", "svg.hashsalt": "tokenflow-ext",
}  # fmt: skip


def panels(*titles: str, widths=None, height: float = 3.3):
    figure, axes = plt.subplots(
        1, len(titles), figsize=(9, height), layout="constrained", gridspec_kw={"width_ratios": widths}
    )
    axes = [axes] if len(titles) == 1 else list(axes)
    for ax, title in zip(axes, titles):
        ax.set_title(title)
    return figure, axes


def plane(ax, reach: float = 1.0, wide: float | None = None) -> None:
    """The plane to `reach` up and down, `wide` to the sides, without ticks."""
    wide = reach if wide is None else wide
    ax.set(xlim=(-wide, wide), ylim=(-reach, reach), xticks=[], yticks=[])
    ax.set_aspect("equal")
    ax.spines[:].set_visible(False)


def arrow(ax, start, end, colour, width: float = 1.6, **options) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
    style["mutation_scale"] = 6 + 3 * width
    ax.annotate("", tuple(map(float, end)), tuple(map(float, start)), arrowprops={**style, **options}, zorder=5)


def links(ax, starts, ends, colour, width: float, **options) -> None:
    """Lines from every start to its end, as one path."""
    gaps = torch.full_like(starts, torch.nan)
    ax.plot(*torch.stack([starts, ends, gaps], 1).reshape(-1, 2).T, color=colour, lw=width, **options)


def put(table: torch.Tensor, value) -> None:
    with torch.no_grad():
        table.copy_(torch.as_tensor(value, dtype=table.dtype))


def cell(codes, k: int, reach: float, wide: float):
    """The polygon of the points nearer to code k than to any other, within a rectangle."""
    polygon = [(-wide, -reach), (wide, -reach), (wide, reach), (-wide, reach)]
    for j, other in enumerate(codes):
        if j == k or not polygon:
            continue
        normal, middle = other - codes[k], (other + codes[k]) / 2
        beyond = [float((torch.tensor(p) - middle) @ normal) for p in polygon]
        clipped = []
        for i, (p, side) in enumerate(zip(polygon, beyond)):
            q, far = polygon[i - 1], beyond[i - 1]
            if (side > 0) != (far > 0):
                t = far / (far - side)
                clipped.append((q[0] + t * (p[0] - q[0]), q[1] + t * (p[1] - q[1])))
            if side <= 0:
                clipped.append(p)
        polygon = clipped
    return polygon


def cells(ax, codes, reach: float, wide: float) -> None:
    for k in range(len(codes)):
        if polygon := cell(codes, k, reach, wide):
            ax.add_patch(Polygon(polygon, facecolor=CELLS[k % len(CELLS)], edgecolor="white", lw=1.5, zorder=0))
    plane(ax, reach, wide)


def on_circle(*degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], -1)


def circle(ax, codes, chosen: int, row, colour, labels=None) -> None:
    """Unit codes, the row as searched, and which code it got."""
    ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor=PALE, lw=1.2))
    arrow(ax, (0, 0), row, INK, 1.5)
    for k, code in enumerate(codes):
        hit = k == chosen
        ax.scatter(*code, s=90 if hit else 45, color=colour if hit else "white", edgecolor=colour, lw=1.4, zorder=6)
        if labels:
            ax.text(*(1.21 * code), labels[k], ha="center", va="center", weight="bold" if hit else "normal", fontsize=9)
    plane(ax, 1.34)


def landscape(count: int, size: int = 16) -> torch.Tensor:
    """Small pictures [count, 3, size, size] of a sun over hills, colours about 0."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    maps = []
    for i in range(count):
        a, b, s = torch.rand(3) if i else torch.tensor([0.35, 0.5, 0.3])
        sky = torch.stack([0.35 + 0.55 * y, 0.55 + 0.3 * y, 0.95 - 0.15 * y])
        sun = torch.sigmoid(60 * (0.17 - ((x - 0.25 - 0.5 * a).square() + (y - 0.3 - 0.1 * b).square()).sqrt()))
        far = torch.sigmoid(50 * (y - 0.62 - 0.10 * torch.sin(6.3 * (x + s))))
        near = torch.sigmoid(50 * (y - 0.78 + 0.12 * torch.sin(5.0 * (x + s))))
        picture = sky
        for shape, colour in ((sun, (1.0, 0.86, 0.35)), (far, (0.38, 0.55, 0.52)), (near, (0.16, 0.36, 0.26))):
            picture = picture * (1 - shape) + torch.tensor(colour)[:, None, None] * shape
        maps.append(2 * picture - 1)
    return torch.stack(maps)


def show(ax, rgb: torch.Tensor) -> None:
    ax.imshow(((rgb + 1) / 2).clamp(0, 1).movedim(0, -1), interpolation="none")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=PALE)
