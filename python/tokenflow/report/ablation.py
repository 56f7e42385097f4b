"""The table, the verdict and the page of `tokenflow ablation`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from tokenflow.data.pictures import skipped_sentence
from tokenflow.report.sections import image
from tokenflow.report.style import document

if TYPE_CHECKING:
    from tokenflow.ablation import Results, Row

COLUMNS = {
    "PSNR": "{:.2f}",
    "ST-LPIPS": "{:.4f}",
    "KID": "{:.4f}",
    "probe": "{:.3f}",
    "teacher cosine": "{:.3f}",
    "tokens": "{}",
    "codes used": "{:.1%}",
    "perplexity": "{:.0f}",
    "steps": "{}",
    "seconds": "{:.0f}",
}
# What counts as reconstruction: +1 where more is better.
RECONSTRUCTION = {"PSNR": 1, "ST-LPIPS": -1, "KID": -1}
NOISE = 0.03
CSS = ".rows { display: grid; gap: 6px 8px; margin-top: 14px; align-items: center; } .rows img { width: 64px; height: 64px; border-radius: 6px; }"


def cells(row: Row) -> list[str]:
    """The numbers of COLUMNS as a table shows them."""
    return ["-" if row.numbers[c] is None else form.format(row.numbers[c]) for c, form in COLUMNS.items()]


def table(rows: Mapping[str, Row]) -> str:
    """One line a variant."""
    lines = [["", *COLUMNS], *([row.variant.title, *cells(row)] for row in rows.values())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        for first, *rest in lines
    )
    return "\n".join("  ".join(line) for line in aligned)


def verdict(rows: Mapping[str, Row]) -> list[str]:
    """Whether the rows of the paper's table came out in its order: a sentence on reconstruction, one on understanding, and
    where they did not, what differs from the paper."""
    published = [row for row in rows.values() if row.variant.paper is not None]
    found = {
        name: [row.numbers[name] for row in published]
        for name in (*RECONSTRUCTION, "probe")
        if all(row.numbers[name] is not None for row in published)
    }
    shown = {name: f"{name} {', '.join(COLUMNS[name].format(v) for v in values)}" for name, values in found.items()}
    wrong = [
        name
        for name, sign in RECONSTRUCTION.items()
        if name in found and any(sign * b <= sign * a for a, b in zip(found[name], found[name][1:], strict=False))
    ]
    fids, points = zip(*(row.variant.paper for row in published), strict=True)
    same = "the same order" if not wrong else f"not the same order in {' and '.join(wrong)}"
    sentences = [
        f"Reconstruction: the paper's rFID falls with every row ({', '.join(map(str, fids))}); here "
        f"{'; '.join(shown[name] for name in RECONSTRUCTION if name in shown)}: {same}."
    ]
    moved = 0.0
    if "probe" in found:
        first, last = found["probe"][0], found["probe"][-1]
        moved = last - first
        what = (
            f"about equal too, as differences under {NOISE} are noise of one seed"
            if abs(moved) < NOISE
            else f"the last row is {'better' if moved > 0 else 'worse'} than the first by {abs(moved):.3f}"
        )
        sentences.append(
            f"Understanding: the paper's MME-P stays about equal ({', '.join(map(str, points))}); here {shown['probe']}: {what}."
        )
    if wrong or abs(moved) >= NOISE:
        sentences.append(
            "What differs from the paper and may be why: the semantic encoder is trained here from nothing, at half the side "
            "of the grid, where the paper's is a pretrained CLIP; "
            f"{', '.join(str(row.numbers['steps']) for row in published)} steps on few pictures, where the paper trains for 50 "
            "epochs of ImageNet, and a pyramid, whose scales each code what the others left, may need more of them than one "
            "scale; a linear probe in place of a language model; one seed."
        )
    return sentences


def ablation_page(results: Results) -> str:
    """The page as HTML that needs nothing else."""
    test = len(results.pictures.rows("test"))
    lead = " ".join(verdict(results.rows))
    body = [
        f"<header><h1>What shared mapping and scales add</h1><p class='lead'>{escape(lead)}</p></header>",
        _numbers(results, test),
        _pictures(results),
        _about(results),
        "<footer>Made by <code>tokenflow ablation</code>. This page needs no network and no scripts.</footer>",
    ]
    return document("TokenFlow's ablation in small", "".join(body), css=CSS)


def _numbers(results: Results, test: int) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = "".join(
        f"<tr><td>{escape(row.variant.title)}</td>{''.join(f'<td>{escape(c)}</td>' for c in cells(row))}</tr>"
        for row in results.rows.values()
    )
    note = (
        f"{test} held-out pictures; one run each, seed {results.plan.seed}: differences under about 0.3 dB or {NOISE} in the probe "
        "mean nothing. KID: kernel distance of EfficientNet-Lite0's features. Probe: balanced accuracy of a linear classifier "
        "on the semantic codes, averaged to 8 × 8 cells."
    )
    return f"<section><h2>Numbers</h2><p class='note'>{note}</p><div class='scroll'><table><tr><th></th>{head}</tr>{rows}</table></div></section>"


def _pictures(results: Results) -> str:
    """A column a picture would not fit: a line a picture, originals first."""
    titles = ["original", *(row.variant.title for row in results.rows.values())]
    parts = [f"<span class='legend'>{escape(title)}</span>" for title in ["", *titles]]
    for place, picture in enumerate(results.chosen):
        caption = results.pictures.captions[picture]
        images = [results.pictures.images[picture], *(row.shown[place] for row in results.rows.values())]
        parts.append(f"<span class='legend'>{escape(caption)}</span>")
        parts += [image(x, f"{caption}, {title}") for x, title in zip(images, titles, strict=True)]
    columns = f"grid-template-columns: minmax(120px, 2fr) repeat({len(titles)}, minmax(70px, 1fr))"
    return (
        "<section><h2>The same pictures</h2><p class='note'>Never trained on; chosen by a hash of their names, not by hand.</p>"
        f"<div class='rows' style='{columns}'>{''.join(parts)}</div></section>"
    )


def _about(results: Results) -> str:
    points = [
        "One distilled codebook: the codes of the semantic features alone, at one scale; the pixel decoder reads them too, and "
        "every loss reaches the one encoder.",
        "Shared mapping adds the pixel encoder and the pixel codebook under the same index. The networks around it are those of "
        "the first row, so it also has more parameters.",
        "Multi-scale spends more tokens a picture, see the table.",
    ]
    if results.pictures.skipped:
        points.append(skipped_sentence(results.pictures.skipped) + ".")
    return f"<section><h2>What the rows are</h2><ul>{''.join(f'<li>{escape(p)}</li>' for p in points)}</ul></section>"
