"""The page of `tokenflow evaluate`: numbers, pictures, use of the codebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from tokenflow.data.pictures import skipped_sentence
from tokenflow.report.charts import bar_chart
from tokenflow.report.pixels import data_uri
from tokenflow.report.style import document

if TYPE_CHECKING:
    from tokenflow.evaluation.run import Evaluation

TILES = (
    "PSNR",
    "SSIM",
    "LPIPS (VGG16)",
    "ST-LPIPS (AlexNet)",
    "rFID",
    "KID on EfficientNet-Lite0",
    "codebook use",
    "perplexity",
)
BARS = 64
LARGE = ".pairs { grid-template-columns: repeat(auto-fill, minmax(332px, 1fr)); } .pairs img { width: 160px; height: auto; }"


def evaluation_page(found: Evaluation) -> str:
    """The page as HTML that needs nothing else."""
    tiles = "".join(
        f"<div class='tile'><b>{escape(str(m))}</b><span>{escape(m.name)}</span></div>"
        for m in found.measures
        if m.name in TILES
    )
    body = [
        f"<header><h1>{escape(found.model['model'])}</h1><p class='lead'>{escape(found.common())}.</p>",
        f"<div class='tiles'>{tiles}</div></header>",
        _numbers(found),
        _pictures(found),
        _usage(found),
        _about(found),
        "<footer>Made by <code>tokenflow evaluate</code>. This page needs no network and no scripts.</footer>",
    ]
    large = bool(found.shown) and found.shown[0][1].shape[-1] > 96
    return document("Evaluation of a tokenizer", "".join(body), css=LARGE if large else "")


def _numbers(found: Evaluation) -> str:
    rows = "".join(
        f"<tr><td>{escape(m.name)}</td><td>{escape(str(m))}</td><td class='text'>{escape(m.protocol)}</td></tr>"
        for m in found.measures
    )
    missing = "".join(f"<li>{escape(m)}</li>" for m in found.missing)
    missing = f"<h3>Not measured</h3><ul>{missing}</ul>" if missing else ""
    return (
        f"<section><h2>Numbers</h2><p class='note'>For all of them: {escape(found.common())}. ± is the standard error.</p>"
        f"<table><tr><th>measure</th><th>value</th><th></th></tr>{rows}</table>{missing}</section>"
    )


def _pictures(found: Evaluation) -> str:
    figures = "".join(
        f"<figure><img src='{data_uri(original)}' alt='original'><img src='{data_uri(image)}' alt='reconstruction'>"
        f"<figcaption>{escape(key)} · {quality:.1f} dB</figcaption></figure>"
        for key, original, image, quality in found.shown
    )
    return (
        "<section><h2>Reconstructions</h2><p class='note'>Left the original, right the reconstruction. Chosen by a hash of their "
        f"names, not by hand.</p><div class='grid pairs'>{figures}</div></section>"
    )


def _usage(found: Evaluation) -> str:
    charts = []
    for name, hits in found.hits.items():
        values = hits.sort(descending=True).values.double()
        bars = [float(part.mean()) for part in values.tensor_split(min(BARS, len(values)))]
        chart = bar_chart(bars, title=f"hits of an id, {name}")
        charts.append(f"<div><h3>{escape(name)}</h3>{chart}<p class='legend'>{int(hits.sum()):,} tokens</p></div>")
    return (
        "<section><h2>Use of the codebooks</h2><p class='note'>Hits of an id, most used first.</p>"
        f"<div class='charts'>{''.join(charts)}</div></section>"
    )


def _about(found: Evaluation) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class='text'>{escape(value)}</td></tr>"
        for name, value in {**found.model, **found.protocol, **found.conditions}.items()
    )
    skipped = f"<p class='note'>{escape(skipped_sentence(found.skipped))}</p>" if found.skipped else ""
    return f"<section><h2>Model and conditions</h2><table>{rows}</table>{skipped}</section>"
