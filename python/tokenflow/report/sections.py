"""The tokenizer's part of the page, a function a section."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import torch

from tokenflow.data.pictures import Pictures, skipped_sentence, stable_order
from tokenflow.evaluation.reconstruction import code_use, psnr
from tokenflow.evaluation.tokenizer import decode_all, prefixes
from tokenflow.report.charts import bar_chart, line_chart
from tokenflow.report.pixels import data_uri

if TYPE_CHECKING:
    from tokenflow.demo import Results

SHOWN = 24
STRIPS = 3
QUERIES = 8
CHARTS = {
    "PSNR": "PSNR of the training batch, dB",
    "semantic": "Distance to the teacher, 1 − cos",
    "commitment": "Commitment loss",
    "ST-LPIPS": "ST-LPIPS of the training batch",
}


def chosen_rows(pictures: Pictures, count: int) -> list[int]:
    """Held-out pictures by a fixed rule, so that none is hand-picked: groups in turn, bases in an order from a hash of the name."""
    first = pictures.one_per_base("test")
    queues: dict[str, list[int]] = {}
    for base in stable_order(list(first)):
        queues.setdefault(pictures.groups[first[base]], []).append(first[base])
    rows: list[int] = []
    while len(rows) < count and any(queues.values()):
        rows += [queue.pop(0) for _, queue in sorted(queues.items()) if queue]
    return rows[:count]


def image(picture: torch.Tensor, alt: str, css: str = "") -> str:
    """An inline picture [3, H, W]."""
    return f"<img src='{data_uri(picture)}' alt='{escape(alt, quote=True)}'{f' class={css!r}' if css else ''}>"


def tiles(results: Results) -> str:
    """The headline numbers."""
    n = results.numbers
    probe = n["probe"]
    perceptual = "–" if n["st-lpips"] is None else f"{n['st-lpips']:.3f}"
    cells = [
        (f"{n['psnr']:.2f} dB", "PSNR of held-out pictures"),
        (
            perceptual,
            "ST-LPIPS (AlexNet), lower is closer" if n["st-lpips"] is not None else "ST-LPIPS: weights not installed",
        ),
        (f"{results.indices.shape[1]}", f"tokens a picture, {results.model.config.codebook_size:,} ids"),
        (f"{100 * n['codebook use']:.0f} %", f"of the ids in use, perplexity {n['perplexity']:,.0f}"),
    ]
    if probe:
        semantic, pixels = probe["semantic half, 8 x 8"], probe["raw pixels"]
        cells.append(
            (
                f"{semantic:.2f}",
                f"balanced {probe['classes']}-way accuracy from the semantic half (raw pixels: {pixels:.2f})",
            )
        )
    best = n["retrieval"]["semantic half, 8 x 8, caption to picture"]
    first = 10 if best["candidates"] > 20 else 1
    cells.append(
        (
            f"{100 * best['recall'][first]:.0f} %",
            f"of unseen captions find their picture in the first {first} of {best['candidates']}",
        )
    )
    return (
        "<div class='tiles'>"
        + "".join(f"<div class='tile'><b>{escape(v)}</b><span>{escape(t)}</span></div>" for v, t in cells)
        + "</div>"
    )


def reconstruction_section(results: Results) -> str:
    """Originals beside reconstructions."""
    pictures, rows = results.pictures, chosen_rows(results.pictures, SHOWN)
    decoded = decode_all(results.model, results.indices[rows])
    quality = psnr(decoded, pictures.float_images(rows))
    figures = [
        f"<figure>{image(pictures.images[r], 'original: ' + pictures.captions[r])}{image(decoded[i], 'reconstruction')}"
        f"<figcaption>{escape(pictures.captions[r])} · {quality[i]:.1f} dB</figcaption></figure>"
        for i, r in enumerate(rows)
    ]
    return (
        "<section><h2>Reconstructions of things never trained on</h2><p class='note'>Left the original, right what "
        f"{results.indices.shape[1]} tokens say. Chosen by a fixed rule (groups in turn, names in hash order), not by hand.</p>"
        f"<div class='grid pairs'>{''.join(figures)}</div></section>"
    )


def prefix_section(results: Results) -> str:
    """The same picture from one scale, two scales, ... all."""
    pictures, rows = results.pictures, chosen_rows(results.pictures, SHOWN)[1::7][:STRIPS]
    scales = results.model.config.scales
    steps = prefixes(results.model, results.indices[rows])
    cells = []
    for i, row in enumerate(rows):
        for number, (scale, images) in enumerate(zip(scales, steps, strict=True)):
            tokens = sum(s * s for s in scales[: number + 1])
            quality = psnr(images[i : i + 1], pictures.float_images([row])).item()
            cells.append(
                f"<figure>{image(images[i], f'{tokens} tokens')}<figcaption>{tokens} token{'s' * (tokens > 1)}, up to {scale} × {scale}"
                f"<br>{quality:.1f} dB</figcaption></figure>"
            )
        cells.append(
            f"<figure>{image(pictures.images[row], 'original')}<figcaption>original: {escape(pictures.captions[row])}</figcaption></figure>"
        )
    means = " → ".join(f"{x:.1f}" for x in results.numbers["psnr of prefixes"])
    return (
        "<section><h2>Coarse to fine</h2><p class='note'>A picture's tokens come scale by scale; any prefix of whole scales decodes. "
        f"Mean PSNR over all held-out pictures: {means} dB.</p>"
        f"<div class='strip' style='grid-template-columns: repeat({len(scales) + 1}, 1fr)'>{''.join(cells)}</div></section>"
    )


def retrieval_section(results: Results) -> str:
    """Held-out captions and the pictures that the semantic half finds for them."""
    pictures, n = results.pictures, results.numbers["retrieval"]
    rows, scores = results.numbers["found"]["rows"], results.numbers["found"]["scores"]
    picked = [rows.index(r) for r in chosen_rows(pictures, len(rows)) if r in rows][:QUERIES]
    found = []
    for column in picked:
        order = scores[:, column].argsort(descending=True).tolist()
        images = "".join(
            image(pictures.images[rows[i]], pictures.captions[rows[i]], "right" if i == column else "")
            for i in order[:6]
        )
        found.append(
            f"<div class='q'>“{escape(pictures.captions[rows[column]])}”<small>its own picture is number {order.index(column) + 1} of {len(rows)}</small></div>"
            f"<div>{images}</div>"
        )
    table = [
        "<div class='scroll'><table><tr><th></th><th>recall@1</th><th>recall@5</th><th>recall@10</th><th>median rank</th></tr>"
    ]
    for name, value in n.items():
        if isinstance(value, dict):
            recall = "".join(f"<td>{100 * value['recall'][k]:.1f} %</td>" for k in (1, 5, 10))
            table.append(f"<tr><td>{escape(name)}</td>{recall}<td>{value['median']:.0f}</td></tr>")
    return (
        "<section><h2>Captions find pictures</h2><p class='note'>A linear map from the tokens' semantic half to "
        f"{escape(n['text'])} text vectors, fitted on training pictures; caption and picture below were both never seen. "
        "Framed: the right picture. Captions chosen by the same fixed rule.</p>"
        f"<div class='found'>{''.join(found)}</div>{''.join(table)}</table></div>"
        f"<p class='note'>{n['candidates']} held-out names, one picture each.</p></section>"
    )


def usage_section(results: Results) -> str:
    """Hits of the codes, sorted, and the perplexity of each scale."""
    config, n = results.model.config, results.numbers
    hits, _, _ = code_use(results.indices, config.codebook_size)
    bins = (
        hits.sort(descending=True).values.double().view(64, -1).mean(1)
        if config.codebook_size % 64 == 0
        else hits.sort(descending=True).values
    )
    return (
        "<section><h2>Use of the codebook</h2><p class='note'>Both halves share one id. Full use is no proof of quality: on plain white a tiny "
        "residual still picks some unit code.</p><div class='charts'><div><h3>Hits of an id, most used first</h3>"
        + bar_chart(bins.tolist(), title="hits of an id, sorted")
        + f"<p class='legend'>{config.codebook_size:,} ids, {results.indices.numel():,} tokens of all pictures</p></div>"
        "<div><h3>Perplexity by scale</h3>"
        + bar_chart(n["perplexity by scale"], title="perplexity by scale", labels=[f"{s} × {s}" for s in config.scales])
        + f"<p class='legend'>All scales together: {n['perplexity']:,.0f} of {config.codebook_size:,}</p></div></div></section>"
    )


def training_section(results: Results) -> str:
    """Curves of both trainings."""
    history = results.stage.history
    half = next((points[0][0] for name, points in history.items() if name == "ST-LPIPS" and points), None)
    charts = [
        f"<div><h3>{escape(title)}</h3>"
        + line_chart(
            history[name],
            title=title,
            x_label="step",
            marks=[(half, "ST-LPIPS on")] if half and name != "ST-LPIPS" else (),
        )
        + "</div>"
        for name, title in CHARTS.items()
        if history.get(name)
    ]
    charts += [
        f"<div><h3>Generator: {escape(name)}, nats</h3>" + line_chart(points, title=name, x_label="step") + "</div>"
        for name, points in results.generator_stage.history.items()
        if points
    ]
    s, g = results.stage, results.generator_stage
    return (
        f"<section><h2>Training</h2><p class='note'>Tokenizer: {s.step:,} steps in {s.elapsed:.0f} s. Generator: {g.step:,} steps in {g.elapsed:.0f} s. "
        f"Pale: every tenth step; strong: running average.</p><div class='charts'>{''.join(charts)}</div></section>"
    )


def numbers_section(results: Results) -> str:
    """One table with the conditions."""
    n, c = results.numbers, results.conditions
    rows: list[tuple[str, str, str]] = [
        ("PSNR", f"{n['psnr']:.2f} dB", f"training pictures {n['psnr of training pictures']:.2f} dB"),
        (
            "ST-LPIPS (AlexNet)",
            "not installed" if n["st-lpips"] is None else f"{n['st-lpips']:.4f}",
            "own rewrite of the shift-tolerant metric; not LPIPS",
        ),
        (
            "Ids in use",
            f"{100 * n['codebook use']:.1f} %",
            f"perplexity {n['perplexity']:,.0f} of {results.model.config.codebook_size:,}",
        ),
        (
            "Cosine to the teacher",
            f"{n['teacher cosine']:.3f}",
            f"training pictures {n['teacher cosine of training pictures']:.3f}; "
            f"the target keeps {100 * results.explained:.0f} % of the teacher's variance",
        ),
    ]
    if n["probe"]:
        rows += [
            (f"Probe: {name}", f"{value:.3f}", "balanced accuracy")
            for name, value in n["probe"].items()
            if isinstance(value, float)
        ]
        rows.append(
            (
                "Probe: chance",
                f"{1 / n['probe']['classes']:.3f}",
                f"{n['probe']['classes']} classes, the smallest has {n['probe']['smallest class']} test pictures",
            )
        )
    table = "".join(
        f"<tr><td>{escape(a)}</td><td>{escape(b)}</td><td class='text'>{escape(t)}</td></tr>" for a, b, t in rows
    )
    return (
        f"<section><h2>Numbers</h2><p class='note'>{n['pictures']['held out']} pictures of {n['pictures']['held-out bases']} held-out names; "
        f"one run, seed {c['seed']}: differences under about 0.3 dB or 0.03 in the probe mean nothing. The probe's "
        "regularisation is fixed; a stronger one helps raw pixels most and narrows the gap.</p>"
        f"<table><tr><th>measure</th><th>held out</th><th></th></tr>{table}</table><p class='note' style='margin-top:14px'>{escape(described(c))}</p></section>"
    )


def described(c: dict[str, Any]) -> str:
    """The conditions as a sentence."""
    trained = [f"{stage} in {' and then '.join(c[stage]['dtypes'])}" for stage in ("tokenizer", "generator")]
    return (
        f"Trained the {' and the '.join(trained)}. "
        f"{c['processor']}, {c['threads']} thread{'s' * (c['threads'] > 1)}, torch {c['torch']}, Python {c['python']}; this call took {c['seconds of this call']['all']:.0f} s "
        f"and at most {c['peak memory, GB']:.1f} GB of memory."
    )


def honesty_section(results: Results) -> str:
    """What the page does not show."""
    pictures = results.pictures
    emoji = results.plan.data is None
    people = pictures.groups.count("People & Body") / max(1, len(pictures))
    points = [
        "The pictures are rendered illustrations on white, 64 × 64 pixels, not photographs. Nothing here says how the method does on photographs."
        if emoji
        else "All pictures were cut to their centre square and reduced to 64 × 64 pixels.",
        "Held out means: no picture of that name was trained on. Close relatives were (a “woman singer” beside a held-out “man singer”), so unseen is not unrelated."
        if emoji
        else "Held out means: no picture with that caption was trained on.",
        "Captions that were trained on return what the generator has learned by heart; other seeds hardly change the picture. The ridge draft, shown beside it, does most of the work.",
        "Unseen names come out as a blur of related things, words never seen as nothing in particular.",
        "The teacher knows ImageNet's 1,000 classes; what the semantic half knows of other things, it knows from there.",
    ]
    if "pair" in pictures.split:
        points.append("Unseen pairs were hidden from the generator, not from the tokenizer.")
    if emoji:
        points.insert(
            1,
            f"{100 * people:.0f} % of the pictures are people in up to six tones, so accuracies are balanced over the classes.",
        )
    if pictures.skipped:
        points.append(skipped_sentence(pictures.skipped) + ".")
    return (
        "<section><h2>What to keep in mind</h2><ul>"
        + "".join(f"<li>{escape(p)}</li>" for p in points)
        + "</ul></section>"
    )
