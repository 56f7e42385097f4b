"""The pictures of these pages, each from calls of the modules: `python docs/quantizers/pictures.py` (matplotlib, in `.[bench]`)."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle, Polygon, Rectangle

from tokenflow_ext.quantize import (
    AttentionQuantizer,
    IndexPropagationQuantizer,
    MultiScaleQuantizer,
    PrefixMultiScaleQuantizer,
    ProductQuantizer,
    ProjectedQuantizer,
    ResidualQuantizer,
    SharedIndexQuantizer,
    SignQuantizer,
    VectorQuantizer,
)

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


def vector():
    """Rows find the nearest code; the codes that have rows follow them."""
    torch.manual_seed(69)
    middles = torch.tensor([[1.2, 0.8], [-0.8, 1.0], [1.0, -0.8]])
    rows = (middles[:, None] + 0.33 * torch.randn(3, 48, 2)).reshape(-1, 2)
    quantizer = VectorQuantizer(2, 10, metric="l2", update="ema", decay=0.9)
    start = quantizer.codebooks()[0].clone()
    figure, axes = panels("A row takes the nearest code", 'update="ema": codes follow their rows')
    for ax, steps in zip(axes, (0, 60)):
        for _ in range(steps):
            quantizer(rows)
        codes, ids = quantizer.codebooks()[0].clone(), quantizer.encode(rows)
        cells(ax, codes, 1.9, 2.65)
        near = codes[ids]
        links(ax, rows[::3], near[::3], GREY, 0.5, alpha=0.7, zorder=1)
        ax.scatter(*rows.T, s=5, color=INK, alpha=0.55, lw=0, zorder=2)
        used = torch.isin(torch.arange(len(codes)), ids)
        ax.scatter(*codes[used].T, s=70, color=TEAL, edgecolor="white", lw=1.2, zorder=6)
        ax.scatter(*codes[~used].T, s=62, facecolor="white", edgecolor=ORANGE, lw=1.8, zorder=6)
        for a, b in zip(start, codes):
            if float((a - b).norm()) > 0.2:
                arrow(ax, a, b, TEAL, 1.4, shrinkB=4)
    for label, face, edge in (("a code", TEAL, "white"), ("a code without rows: it stays", "white", ORANGE)):
        axes[0].scatter([], [], s=60, facecolor=face, edgecolor=edge, lw=1.6, label=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def rotation():
    """Where rows of one cell are sent by one gradient at their code."""
    code, grad = torch.tensor([[1.0, 0.55]]), torch.tensor([0.0, -0.42])
    angles = torch.arange(8) * (2 * math.pi / 8)
    rows = code + 0.62 * torch.stack([angles.cos(), angles.sin()], 1)
    figure, axes = panels(
        'gradient="straight_through": copied', 'gradient="rotation": turned and scaled with q', height=3.0
    )
    for ax, gradient in zip(axes, ("straight_through", "rotation")):
        quantizer = VectorQuantizer(2, 1, metric="l2", gradient=gradient)
        put(quantizer.codebooks()[0], code)
        x = rows.clone().requires_grad_()
        (quantizer(x).quantized * grad).sum().backward()
        ax.plot(0, 0, "+", color=GREY, ms=9, mew=1.2)
        ax.text(0.06, -0.08, "0", color=GREY, va="top")
        for row, move in zip(rows, -x.grad):
            ax.plot(*torch.stack([torch.zeros(2), row]).T, color=PALE, lw=0.8, zorder=0)
            arrow(ax, row, row + move, ORANGE, 1.5)
        ax.plot(*torch.stack([torch.zeros(2), code[0]]).T, color=TEAL, lw=1.2, alpha=0.5, zorder=1)
        arrow(ax, code[0], code[0] - grad, TEAL, 2.0)
        ax.scatter(*rows.T, s=26, color=ORANGE, edgecolor="white", lw=0.8, zorder=6)
        ax.scatter(*code.T, s=90, color=TEAL, edgecolor="white", lw=1.2, zorder=6)
        plane(ax)
        ax.set(xlim=(-0.75, 2.6), ylim=(-0.3, 1.85))
    for label, colour in (("code q, and minus its gradient", TEAL), ("rows y that chose it, and minus theirs", ORANGE)):
        axes[0].scatter([], [], s=45, color=colour, label=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


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


def multi_codebook():
    """Channels in four slices, each with a codebook of its own."""
    torch.manual_seed(6)
    groups, codes = 4, 12
    quantizer = VectorQuantizer(2 * groups, codes, groups=groups)
    angles = torch.arange(codes) * (360 / codes) + 16 * torch.rand(groups, codes)
    put(quantizer.codebooks()[0], torch.stack([on_circle(*a.tolist()) for a in angles]))
    x = torch.randn(1, 2 * groups)
    ids = quantizer(x).indices[0]
    rows = torch.nn.functional.normalize(x.reshape(groups, 2), dim=-1)
    colours = (TEAL, ORANGE, PURPLE, "#5b8c3e")
    figure = plt.figure(figsize=(9, 3.3), layout="constrained")
    grid = figure.add_gridspec(2, groups, height_ratios=[0.42, 2])
    top = figure.add_subplot(grid[0, :])
    for c in range(2 * groups):
        top.add_patch(Rectangle((c + 0.04, 0), 0.92, 1, facecolor=colours[c // 2], alpha=0.85, lw=0))
        top.text(c + 0.5, 0.47, f"{float(x[0, c]):+.1f}", color="white", ha="center", va="center", weight="bold")
    top.set(xlim=(0, 2 * groups), ylim=(0, 1), xticks=[], yticks=[])
    top.set_title("One row of 8 channels, groups=4: every slice goes to a codebook of its own")
    top.spines[:].set_visible(False)
    for g in range(groups):
        ax = figure.add_subplot(grid[1, g])
        names = [str(k) for k in range(codes)]
        circle(ax, quantizer.codebooks()[0][g].detach(), int(ids[g]), rows[g], colours[g], names)
        ax.set_title(f"id {int(ids[g])}", loc="center", y=-0.06, pad=0)
    return figure


def shared_index():
    """The code that suits both halves wins, though each half alone has another nearest one."""
    semantic, pixel = on_circle(66, 250, 85, 140, 190, 320, 15), on_circle(25, 207, 232, 100, 300, 60, 345)
    row = torch.cat([on_circle(60), on_circle(202)], 1)
    quantizer = SharedIndexQuantizer((2, 2), 7)
    for table, value in zip(quantizer.codebooks(), (semantic, pixel)):
        put(table, value)
    chosen = int(quantizer(row).indices)
    names = "ABCDEFG"
    figure, (left, middle, right) = panels(
        "Semantic table", "Pixel table", "Sum of both distances", widths=[1, 1, 1.25], height=3.1
    )
    circle(left, semantic, chosen, row[0, :2], TEAL, names)
    circle(middle, pixel, chosen, row[0, 2:], ORANGE, names)
    parts = [(half - table).square().sum(-1) for half, table in zip(row.split(2, 1), (semantic, pixel))]
    right.bar(range(7), parts[0], color=TEAL, width=0.62, label="semantic")
    right.bar(range(7), parts[1], bottom=parts[0], color=ORANGE, width=0.62, label="pixel")
    total = parts[0] + parts[1]
    right.annotate(
        "one index", (chosen, float(total[chosen]) + 0.1), (chosen, 6.3), ha="center", weight="bold",
        arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.2},
    )  # fmt: skip
    right.set(xticks=range(7), ylim=(0, 8.4), ylabel="$2 - 2\\,\\cos$")
    right.set_xticklabels(names)
    right.legend(frameon=False, ncols=2, loc="upper left")
    return figure


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


def multi_scale():
    """What each scale adds, and what a decoder sees after it."""
    torch.manual_seed(0)
    scales = (1, 2, 4, 8, 16)
    quantizer = MultiScaleQuantizer(VectorQuantizer(3, 128, metric="l2", update="ema", kmeans_init=True), scales)
    pictures = landscape(32)
    for _ in range(40):
        quantizer(pictures)
    quantizer.eval()
    ids = quantizer(pictures[:1]).indices
    figure, axes = plt.subplots(2, 6, figsize=(9, 3.55), layout="constrained")
    at = 0
    for s, (n, grid) in enumerate(zip(scales, quantizer.split(ids))):
        at += n * n
        show(axes[0, s], quantizer.quantizer.decode(grid[0]).detach().movedim(-1, 0))
        show(axes[1, s], quantizer.decode(ids[:, :at])[0].detach())
        axes[0, s].set_title(f"{n} x {n}", loc="center", weight="normal")
        axes[1, s].set_xlabel("1 id" if at == 1 else f"{at} ids", labelpad=4)
    axes[0, 0].set_ylabel("codes chosen", labelpad=6)
    axes[1, 0].set_ylabel("their sum so far", labelpad=6)
    axes[0, 5].set_visible(False)
    show(axes[1, 5], pictures[0])
    axes[1, 5].set_xlabel("features", labelpad=4, weight="bold")
    return figure


def product():
    """Left: codes are all pairs. Right: which scales the samples of a batch keep."""
    torch.manual_seed(2)
    quantizer = ProductQuantizer([VectorQuantizer(1, 6, metric="l2", update="ema", kmeans_init=True) for _ in range(2)])
    rows = 1.2 * (2 * torch.rand(90, 2) - 1)
    for _ in range(20):
        quantizer(rows)
    near, (first, second) = quantizer(rows).quantized.detach(), [t[:, 0].sort().values for t in quantizer.codebooks()]
    figure, (left, right) = panels(
        "6 + 6 codes side by side make 36",
        "dropped=0.5: four samples of eight stop early",
        widths=[1, 1.35],
        height=3.4,
    )
    for line in first:
        left.axvline(line, color=TEAL, lw=1, alpha=0.35, zorder=0)
    for line in second:
        left.axhline(line, color=ORANGE, lw=1, alpha=0.35, zorder=0)
    links(left, rows, near, GREY, 0.7, zorder=1)
    left.scatter(*rows.T, s=6, color=INK, alpha=0.6, lw=0, zorder=2)
    left.scatter(*torch.cartesian_prod(first, second).T, s=24, color=PURPLE, edgecolor="white", lw=0.7, zorder=3)
    plane(left, 1.5)
    left.scatter(first, [-1.5] * 6, s=60, color=TEAL, clip_on=False, zorder=4)
    left.scatter([-1.5] * 6, second, s=60, color=ORANGE, clip_on=False, zorder=4)
    scales = (1, 2, 3, 4, 6, 8)
    torch.manual_seed(3)
    prefix = PrefixMultiScaleQuantizer(VectorQuantizer(2, 16), scales, dropped=0.5)
    grids = prefix.split(prefix(torch.randn(8, 2, 8, 8)).indices)
    for s, grid in enumerate(grids):
        for b, ids in enumerate(grid.flatten(1)):
            kept = bool((ids >= 0).all())
            box = {"facecolor": TEAL, "alpha": 0.85} if kept else {"facecolor": "white", "edgecolor": PALE}
            right.add_patch(Rectangle((s + 0.06, b + 0.1), 0.88, 0.8, **box))
            if not kept:
                right.text(s + 0.5, b + 0.52, "-1", ha="center", va="center", color=GREY, fontsize=8.5)
    right.set(xlim=(0, len(scales)), ylim=(8, 0), yticks=[], ylabel="samples", xlabel="scales")
    right.set_xticks([s + 0.5 for s in range(len(scales))], [f"{n} x {n}" for n in scales])
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    return figure


def index_propagation():
    """The softmax over the codes, and what one row's reconstruction sends to each of them."""
    torch.manual_seed(7)
    codes, z, wanted = 1.1 * torch.randn(26, 2), torch.tensor([[1.1, 0.9]]), torch.tensor([[0.3, 1.9]])
    p = torch.softmax((z @ codes.T)[0].double(), 0).round(decimals=6)
    order = p.argsort(descending=True)
    figure, (left, right) = panels(
        "A row and softmax(z E^T), as areas", "Gradient of one row at each code, most probable first", widths=[1, 1.35]
    )
    left.scatter(*codes.T, s=14 + 1500 * p, color=TEAL, edgecolor="white", alpha=0.9, zorder=3)
    left.scatter(*z[0], marker="X", s=80, color=ORANGE, edgecolor="white", zorder=7)
    left.text(float(z[0, 0]) + 0.16, float(z[0, 1]) - 0.1, "row z", color=ORANGE, weight="bold", va="top", zorder=8)
    plane(left, 3.0)
    soft, hard = IndexPropagationQuantizer(2, 26), VectorQuantizer(2, 26, metric="dot")
    for quantizer, colour, shift, label in (
        (soft, TEAL, -0.2, "IndexPropagationQuantizer, through quantized"),
        (hard, ORANGE, 0.2, "VectorQuantizer, through its loss"),
    ):
        put(quantizer.codebooks()[0], codes)
        quantized, _, loss = quantizer(z)
        ((quantized - wanted).square().sum() if quantizer is soft else loss).backward()
        size = quantizer.codebooks()[0].grad.norm(dim=-1)[order]
        right.bar(torch.arange(26) + shift, size, width=0.4, color=colour, label=label)
    right.set(yscale="log", xticks=[], xlabel="codes", ylabel="norm of the gradient", ylim=(1e-3, 60))
    right.minorticks_off()
    right.legend(frameon=False, loc="upper right")
    return figure


def attention():
    """Keys decide, values are handed on."""
    torch.manual_seed(3)
    quantizer = AttentionQuantizer(2, 9, key_dim=2)
    put(quantizer.codebooks()[0], torch.randn(9, 2))
    put(quantizer.to_k.weight, torch.tensor([[0.9, -0.5], [0.3, 1.1]]))
    put(quantizer.to_v.weight, torch.tensor([[0.7, 0.6], [-0.8, 0.5]]))
    put(quantizer.norm_q.weight, [1.6, 1.6])
    z = torch.randn(1, 2)
    # Rounded, because a matrix product's last bit depends on where its memory lies.
    keys, values, query = (
        t.detach().double().round(decimals=4) for t in (*quantizer.keys_and_values(), quantizer.queries(z)[0])
    )
    chosen = int(quantizer(z).indices)
    p = torch.softmax(quantizer.scale * (keys @ query), 0).round(decimals=4)
    soft = (p @ values).round(decimals=4)
    figure, (left, middle, right) = panels("Query and keys", "Attention", "Values", widths=[1, 1.1, 1], height=3.1)
    left.add_patch(Circle((0, 0), 2**0.5, fill=False, edgecolor=PALE, lw=1.2))
    arrow(left, (0, 0), query, INK, 1.6)
    for k in range(9):
        hit = k == chosen
        face = {"color": TEAL if hit else "white", "edgecolor": TEAL, "s": 95 if hit else 50, "lw": 1.4, "zorder": 6}
        left.scatter(*keys[k], **face)
        right.scatter(*values[k], **{**face, "color": ORANGE if hit else "white", "edgecolor": ORANGE})
    middle.bar(range(9), p, color=[TEAL if k == chosen else PALE for k in range(9)], width=0.7)
    middle.set(xticks=range(9), xlabel="code", yticks=[], ylabel="softmax(q.k / sqrt d)")
    middle.spines["left"].set_visible(False)
    right.scatter(*soft, marker="D", s=55, color=PURPLE, edgecolor="white", zorder=7)
    plane(left, 2.4)
    far = 1.25 * float(values.abs().max())
    plane(right, far)
    right.scatter([], [], s=80, color=ORANGE, label="hard: forward")
    right.scatter([], [], s=50, marker="D", color=PURPLE, label="soft: backward")
    right.legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, columnspacing=1, handletextpad=0.2
    )
    return figure


def projected():
    """A frozen vocabulary under one projection, two windows of it."""
    torch.manual_seed(11)
    table, projection = torch.randn(60, 8), torch.nn.Linear(8, 2)
    windows = {"nouns, adjectives": (0, 34, TEAL), "verbs, adverbs": (34, 60, ORANGE)}
    rows = torch.tensor([[0.55, 0.15], [-0.6, 0.45], [0.1, -0.75]])
    figure, (left, right) = panels("A frozen table, sorted", "Its codes under a learned projection", widths=[0.9, 1.1])
    for number, (name, (lo, hi, colour)) in enumerate(windows.items()):
        quantizer = ProjectedQuantizer(table, 2, projection=projection, window=(lo, hi))
        codes, ids = quantizer.codebooks()[0].detach().double().round(decimals=4), quantizer(rows).indices
        right.scatter(*codes.T, s=24, facecolor="white", edgecolor=colour, lw=1.3, zorder=2)
        for row, i in zip(rows, ids):
            right.plot(*torch.stack([row, codes[i - lo]]).T, color=colour, lw=1.6, zorder=3)
            right.scatter(*codes[i - lo], s=60, color=colour, edgecolor="white", zorder=4)
        for i in range(lo, hi):
            r, c = divmod(i, 10)
            hit = bool((ids == i).any())
            left.add_patch(
                Rectangle((c + 0.06, r + 0.08), 0.88, 0.84, facecolor=colour, alpha=1.0 if hit else 0.25, lw=0)
            )
            left.text(c + 0.5, r + 0.52, i, ha="center", va="center", fontsize=8, color="white" if hit else INK)
        left.text(0.06 + 5 * number, 6.65, f"{name}\nwindow=({lo}, {hi})", color=colour, va="center", weight="bold")
    right.scatter(*rows.T, marker="X", s=75, color=INK, edgecolor="white", zorder=6)
    right.scatter([], [], marker="X", s=70, color=INK, label="a row: one search in each window")
    left.set(xlim=(0, 10), ylim=(7.2, 0), xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    plane(right, 1.55)
    right.set(xlim=(-2.2, 2.2))
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.02))
    return figure


def sign():
    """Corners of a cube as codes, and of a square on the circle."""
    torch.manual_seed(8)
    figure, (left, right) = panels(
        "SignQuantizer(3): 8 corners, ids are bits", "spherical=True: rows and codes on the sphere"
    )
    view = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.42, 0.34]])
    lfq = SignQuantizer(3)
    corners = lfq.decode(torch.arange(8))
    for a in range(8):
        for bit in range(3):
            if not a >> bit & 1:
                hidden = 0 == corners[a, 2] - 1 or corners[a | 1 << bit, 2] > 0
                ends = torch.stack([corners[a], corners[a | 1 << bit]]) @ view
                left.plot(*ends.T, color=PALE if hidden else GREY, lw=1.2, zorder=0)
    rows = torch.tensor([[0.5, 0.6, -0.6], [-0.5, 0.45, 0.7], [0.6, -0.45, 0.5], [-0.3, -0.6, -0.3], [0.5, 0.9, 0.9]])
    for row, code in zip(rows @ view, lfq(rows).quantized @ view):
        arrow(left, row, code, ORANGE, 1.1, shrinkB=5)
    left.scatter(*(rows @ view).T, s=22, color=ORANGE, edgecolor="white", lw=0.6, zorder=7)
    left.scatter(*(corners @ view).T, s=55, color=TEAL, edgecolor="white", zorder=6)
    for i, corner in enumerate(corners):
        at = corner @ view
        side = 1 if corner[0] > 0 else -1
        left.text(
            float(at[0]) + 0.13 * side,
            float(at[1]),
            f"{i} = {i:03b}",
            va="center",
            ha="left" if side > 0 else "right",
            zorder=8,
        )
    plane(left, 1.75)
    left.set(xlim=(-2.6, 2.6))
    bsq = SignQuantizer(2, spherical=True)
    right.add_patch(Circle((0, 0), 1, fill=False, edgecolor=PALE, lw=1.2))
    right.axhline(0, color=PALE, lw=1, zorder=0)
    right.axvline(0, color=PALE, lw=1, zorder=0)
    rows = torch.nn.functional.normalize(torch.randn(13, 2), dim=-1)
    for row, code in zip(rows, bsq(rows).quantized):
        arrow(right, row, code, ORANGE, 1.0, shrinkB=5, connectionstyle="arc3,rad=0")
    right.scatter(*rows.T, s=22, color=ORANGE, edgecolor="white", lw=0.6, zorder=7)
    corners = bsq.decode(torch.arange(4))
    right.scatter(*corners.T, s=70, color=TEAL, edgecolor="white", zorder=6)
    for i, corner in enumerate(corners):
        right.text(*(1.3 * corner), f"{i} = {i:02b}", ha="left" if corner[0] > 0 else "right", va="center")
    plane(right, 1.35)
    right.set(xlim=(-1.9, 1.9))
    return figure


def residual():
    """Each level codes what the ones before left over."""
    torch.manual_seed(9)
    quantizer = ResidualQuantizer(2, 5, 4, update="ema", kmeans_init=True)
    rows = torch.randn(600, 2)
    for _ in range(30):
        quantizer(rows)
    quantizer.eval()
    paths = torch.stack([quantizer.decode(quantizer.encode(rows)[:, :d]) for d in range(5)], 1)
    steps = (paths[:, 1:] - paths[:, :-1]).norm(dim=-1)[:, 1:].amin(1)
    longest = int(steps.masked_fill(rows[:, 0] > 1.2, 0).argmax())  # whose smallest step shows best
    x, path, ids = rows[longest], paths[longest], quantizer.encode(rows)[longest]
    colours = (TEAL, ORANGE, PURPLE, "#5b8c3e")
    figure, (left, right) = panels(
        "One row, four levels", "Mean squared error of 600 rows", widths=[1.25, 1], height=3.2
    )
    for d in range(2):
        spots = path[d] + quantizer.codebooks()[d]
        left.scatter(*spots.T, s=26, facecolor="white", edgecolor=colours[d], lw=1.3, zorder=2)
    for d in range(4):
        arrow(left, path[d], path[d + 1], colours[d], 1.8, mutation_scale=9)
        left.plot([], [], color=colours[d], lw=2.4, label=f"level {d + 1}: id {int(ids[d])}")
    left.plot(0, 0, "+", color=GREY, ms=9, mew=1.2)
    left.scatter(*x, marker="X", s=70, color=INK, edgecolor="white", zorder=7)
    plane(left, 1.8)
    left.set(xlim=(-1.9, 4.1))
    left.legend(frameon=False, loc="center right")
    ids = quantizer.encode(rows)
    errors = [float((quantizer.decode(ids[:, :d]) - rows).square().mean()) for d in range(5)]
    right.bar(range(5), errors, color=[PALE, *colours], width=0.66)
    right.set(yscale="log", xticks=range(5), xlabel="levels decoded", ylim=(min(errors) / 2, 2.5))
    for d, error in enumerate(errors):
        right.text(d, error * 1.12, f"{error:.2g}", ha="center", va="bottom", fontsize=9)
    right.set_yticks([])
    right.minorticks_off()
    right.spines["left"].set_visible(False)
    return figure


PICTURES = (
    multi_codebook, vector, rotation, shared_index, multi_scale, product, index_propagation, attention, projected, sign, residual,
)  # fmt: skip


def write(folder: Path, suffix: str = "svg") -> list[Path]:
    """Draws every picture into the folder; the same bytes every time."""
    written = []
    with plt.rc_context(STYLE):
        for draw in PICTURES:
            path, figure = folder / f"{draw.__name__}.{suffix}", draw()
            # The layout's last bits vary from run to run.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            for ax in figure.axes:
                ax.set_position([round(side, 4) for side in ax.get_position(original=True).bounds])
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            plt.close(figure)
            written.append(path)
    return written


if __name__ == "__main__":
    for path in write(Path(__file__).parent):
        print(path)
