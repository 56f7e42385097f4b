"""The demo's page: runs/demo/index.html, self-contained, and result.png for a README."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokenflow.files import write_whole
from tokenflow.report.generated import generator_section
from tokenflow.report.pixels import sheet
from tokenflow.report.sections import (
    chosen_rows,
    honesty_section,
    numbers_section,
    prefix_section,
    reconstruction_section,
    retrieval_section,
    tiles,
    training_section,
    usage_section,
)
from tokenflow.report.style import document

if TYPE_CHECKING:
    from tokenflow.demo import Results


def write_page(results: Results) -> Path:
    """Write index.html and result.png into the output folder; returns the page's path."""
    out = results.plan.out
    test = results.pictures.rows("test")
    body = [
        "<header><h1>Pictures as tokens, with what they mean</h1>",
        f"<p class='lead'>TokenFlow in miniature: every token's single id points into two codebooks, one for meaning and one for looks. "
        f"Trained here from nothing on {results.numbers['pictures']['training']:,} small pictures; "
        f"unless marked otherwise, everything below is about the {len(test):,} pictures whose names it was never trained on.</p>",
        tiles(results),
        "</header>",
        reconstruction_section(results),
        prefix_section(results),
        generator_section(results.figures),
        retrieval_section(results),
        usage_section(results),
        training_section(results),
        numbers_section(results),
        honesty_section(results),
        "<footer>Made by <code>tokenflow demo</code>. This page needs no network and no scripts.</footer>",
    ]
    html = document("Pictures as tokens: a TokenFlow demo", "".join(body))
    page = out / "index.html"
    write_whole(page, html)
    write_result(results, out / "result.png")
    return page


def write_result(results: Results, path: Path) -> None:
    """One sheet: originals, reconstructions, prefixes of one picture, generated pictures."""
    from tokenflow.evaluation.tokenizer import decode_all, prefixes

    pictures, columns = results.pictures, 8
    rows = chosen_rows(pictures, columns)
    first = rows[1 % len(rows)]
    steps = [p[0] for p in prefixes(results.model, results.indices[[first]])]
    names = [pictures.captions[r] for r in rows]
    ends = [sum(s * s for s in results.model.config.scales[: i + 1]) for i in range(len(steps))]
    lines = [
        ("Never trained on: original", [pictures.images[r] for r in rows], names),
        (f"... from {results.indices.shape[1]} tokens", list(decode_all(results.model, results.indices[rows])), []),
        (
            "Coarse to fine",
            [*steps, pictures.images[first]],
            [*(f"{e} token{'s' * (e > 1)}" for e in ends), "original"],
        ),
    ]
    for row in results.figures["rows"]:
        lines.append(
            (
                f"Written from a caption: {row['title'][0].lower()}{row['title'][1:]}",
                [i["generated"] for i in row["items"]],
                [i["caption"] for i in row["items"]],
            )
        )
    temporary = path.with_name("result.part.png")
    sheet(lines).save(temporary, optimize=True)
    os.replace(temporary, path)
