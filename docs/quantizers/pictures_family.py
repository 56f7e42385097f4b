"""One codebook, several, a shared index, scales: the quantizers of the tokenizers in this package."""

import math

import matplotlib.pyplot as plt
import torch
from drawing import (
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    TEAL,
    arrow,
    cells,
    circle,
    landscape,
    links,
    on_circle,
    panels,
    plane,
    put,
    show,
)
from matplotlib.patches import Rectangle

from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer


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
