"""The generator's part of the page."""

from __future__ import annotations

from html import escape
from typing import Any

from tokenflow.report.pixels import data_uri

MARKS = {"seen": "seen in training", "unseen pair": "unseen pair", "unseen name": "unseen name", "typed": "typed"}
KINDS = {
    "seen": "captions trained on, no tone",
    "unseen pair": "unseen (name, tone) pairs",
    "unseen name": "unseen names",
}


def generator_section(figures: dict[str, Any]) -> str:
    """Pictures from captions: generated large, the draft and the real one small, then the numbers."""
    parts = [
        "<section><h2>Pictures from captions</h2><p class='note'>A small transformer writes the tokens scale by scale. "
        "Large: what it wrote. Small: the ridge draft it starts from (left) and, where there is one, the real picture (right).</p>"
    ]
    for row in figures["rows"]:
        parts.append(f"<h3>{escape(row['title'])}</h3><p class='note'>{escape(row['note'])}</p><div class='grid made'>")
        parts += [made(item) for item in row["items"]]
        parts.append("</div>")
    return "".join([*parts, table(figures["numbers"]), "</section>"])


def made(item: dict[str, Any]) -> str:
    """One generated picture with its draft, the real one, the caption and a badge."""
    caption = escape(item["caption"])
    small = f"<img src='{data_uri(item['draft'])}' alt='draft' title='ridge draft'>"
    if item["real"] is not None:
        small += f"<img src='{data_uri(item['real'])}' alt='real picture' title='real picture'>"
    unknown = f"<br>never seen: {escape(', '.join(item['unknown']))}" if item["unknown"] else ""
    badge = "badge" if item["mark"] == "seen" else "badge hidden"
    return (
        f"<figure><img class='big' src='{data_uri(item['generated'])}' alt='generated: {caption}'><div class='small'>{small}</div>"
        f"<figcaption>{caption}{unknown}</figcaption><span class='{badge}'>{escape(MARKS.get(item['mark'], item['mark']))}</span></figure>"
    )


def table(numbers: dict[str, Any]) -> str:
    """PSNR and how often the nearest real picture is the right one, for draft, generator and the true tokens."""
    if not numbers:
        return ""
    parts = [
        "<div class='scroll'><table><tr><th>captions</th><th>pictures</th><th>made by</th><th>right name</th><th>right tone</th><th>PSNR, dB</th></tr>"
    ]
    for kind, values in numbers.items():
        for who, label in (("draft", "draft alone"), ("generator", "generator"), ("tokenizer", "true tokens")):
            v = values[who]
            tone = f"{v['tone']:.2f}" if kind == "unseen pair" else "–"
            parts.append(
                f"<tr><td>{escape(KINDS.get(kind, kind))}</td><td>{values['count']}</td><td>{label}</td><td>{v['base']:.2f}</td>"
                f"<td>{tone}</td><td>{v['psnr']:.1f}</td></tr>"
            )
    parts.append(
        "</table></div><p class='note'>Right name / tone: the real picture nearest to the generated one at 16 × 16 pixels, among all pictures, "
        "has that name / tone. True tokens: the tokenizer's own tokens of the real picture, decoded. The draft is not quantized, so its blur can "
        "score a higher PSNR than sharper tokens.</p>"
    )
    entropies = "; ".join(
        f"{KINDS.get(kind, kind)}: " + ", ".join(f"{x:.2f}" for x in v["cross_entropy"]) for kind, v in numbers.items()
    )
    return "".join(
        [*parts, f"<p class='note'>Cross-entropy of the true tokens by scale, nats: {escape(entropies)}.</p>"]
    )
