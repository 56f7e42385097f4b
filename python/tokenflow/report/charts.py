"""Small SVG charts without a plotting library: a line over steps, and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 26


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = max(high - low, 1e-12)
    raw = span / max(1, count)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.7)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it.

    >>> short(2500), short(0.25), short(3.0)
    ('2.5k', '0.25', '3')
    """
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:.4g}"


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
    smooth: float | None = None,
) -> str:
    """An SVG line through (x, y) points: the raw values pale, their exponential average strong.

    Args:
        points: at least one.
        title: read out by screen readers.
        x_label: under the axis.
        marks: (x, text) of dotted upright lines.
        smooth: weight of the past in the average; by default 1 - 10 / points, at most 0.9.
    """
    smooth = max(0.0, min(0.9, 1 - 10 / len(points))) if smooth is None else smooth
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    ordered = sorted(ys)
    low, high = ordered[len(ys) // 200], ordered[-1 - len(ys) // 200]
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin
    x_of = lambda x: LEFT + (x - xs[0]) / max(1e-12, xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    y_of = lambda y: TOP + (high - min(high, max(low, y))) / (high - low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    average, run = [], ys[0]
    for i, y in enumerate(ys):
        weight = min(smooth, i / (i + 1))
        run = weight * run + (1 - weight) * y
        average.append(run)
    path = lambda values: " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(xs, values, strict=True))  # noqa: E731
    parts = _frame(title, ticks(low, high), y_of)
    parts += [
        f'<text class="tick" x="{x_of(x):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{short(x)}</text>'
        for x in ticks(xs[0], xs[-1])
    ]
    parts += [f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT}" text-anchor="end">{escape(x_label)}</text>']
    for x, text in marks:
        parts += [
            f'<line class="mark" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
            f'<text class="tick" x="{x_of(x) + 4:.1f}" y="{TOP + 10}">{escape(text)}</text>',
        ]
    parts += [
        f'<polyline class="raw" points="{path(ys)}"/>',
        f'<polyline class="line" points="{path(average)}"/>',
        "</svg>",
    ]
    return "".join(parts)


def bar_chart(values: Sequence[float], *, title: str, labels: Sequence[str] = ()) -> str:
    """An SVG of upright bars from zero, with labels underneath where given."""
    high = max(values) * 1.06 or 1.0
    y_of = lambda y: TOP + (high - y) / high * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    width = (WIDTH - LEFT - RIGHT) / len(values)
    gap = 0.25 * width if labels else 0.0
    parts = _frame(title, ticks(0.0, high), y_of)
    for i, value in enumerate(values):
        parts.append(
            f'<rect class="bar" x="{LEFT + i * width + gap / 2:.2f}" y="{y_of(value):.2f}" width="{width - gap:.2f}" '
            f'height="{HEIGHT - BOTTOM - y_of(value):.2f}"/>'
        )
        if labels:
            parts.append(
                f'<text class="tick" x="{LEFT + (i + 0.5) * width:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(labels[i])}</text>'
            )
    return "".join([*parts, "</svg>"])


def _frame(title: str, grid: Sequence[float], y_of) -> list[str]:
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT + 6}" role="img" aria-label="{escape(title)}">']
    for y in grid:
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>',
            f'<text class="tick" x="{LEFT - 6}" y="{y_of(y) + 3.5:.1f}" text-anchor="end">{short(y)}</text>',
        ]
    return parts
