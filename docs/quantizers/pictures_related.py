"""The quantizers of related papers."""

import torch
from drawing import GREY, INK, ORANGE, PALE, PURPLE, TEAL, arrow, links, panels, plane, put
from matplotlib.patches import Circle, Rectangle

from tokenflow_ext.quantize import (
    AttentionQuantizer,
    IndexPropagationQuantizer,
    PrefixMultiScaleQuantizer,
    ProductQuantizer,
    ProjectedQuantizer,
    ResidualQuantizer,
    SignQuantizer,
    VectorQuantizer,
)


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
