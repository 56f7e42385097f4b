"""What every page has: its frame and its style sheet."""

from __future__ import annotations

from html import escape

CSS = """
:root { --ink: #1c1d22; --soft: #62656f; --line: #e3e4e9; --accent: #3457d5; --warm: #b4531a; --card: #fff; --paper: #f6f6f4; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 28px 80px; }
h1 { font-size: 34px; line-height: 1.15; margin: 0 0 8px; letter-spacing: -0.02em; }
h2 { font-size: 22px; margin: 0 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 22px 0 2px; }
p { margin: 0 0 12px; max-width: 74ch; }
.lead { font-size: 18px; color: var(--soft); }
.note, figcaption, .legend { color: var(--soft); font-size: 14px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 26px 28px; margin-top: 22px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 22px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; }
.tile b { display: block; font-size: 26px; letter-spacing: -0.02em; line-height: 1.2; }
.tile span { color: var(--soft); font-size: 13px; display: block; line-height: 1.35; }
.grid { display: grid; gap: 16px 12px; margin-top: 14px; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
figure { margin: 0; }
figure img { width: 64px; height: 64px; display: inline-block; }
.pairs img { width: 71px; height: 71px; border: 1px solid var(--line); border-radius: 8px; }
.pairs img + img { margin-left: 4px; }
figcaption { font-size: 12.5px; line-height: 1.3; margin-top: 4px; overflow-wrap: anywhere; }
.strip { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; margin-top: 14px; text-align: center; }
.strip img { width: 100%; max-width: 128px; height: auto; border: 1px solid var(--line); border-radius: 10px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 20px 24px; margin-top: 12px; }
.charts h3 { margin: 0 0 4px; }
.chart { width: 100%; height: auto; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .tick { fill: var(--soft); font-size: 10.5px; }
.chart .raw { fill: none; stroke: var(--accent); stroke-opacity: .22; stroke-width: 1; }
.chart .line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.chart .mark { stroke: var(--soft); stroke-dasharray: 2 3; }
.chart .bar { fill: var(--accent); }
table { border-collapse: collapse; margin-top: 14px; font-size: 14.5px; width: 100%; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
td.text { text-align: left; color: var(--soft); font-size: 13.5px; }
.found { display: grid; grid-template-columns: minmax(150px, 230px) 1fr; gap: 8px 18px; align-items: center; margin-top: 14px; }
.found img { width: 64px; height: 64px; border: 1px solid var(--line); border-radius: 8px; margin-right: 6px; padding: 2px; background: #fff; }
.found img.right { border: 2px solid var(--accent); padding: 1px; }
.found .q { font-size: 14.5px; line-height: 1.3; }
.found .q small { color: var(--soft); display: block; }
.made { grid-template-columns: repeat(auto-fill, minmax(108px, 1fr)); gap: 16px 8px; }
.made .small { display: flex; gap: 4px; margin-top: 4px; }
.made .small img { width: 50px; height: 50px; border: 1px solid var(--line); border-radius: 6px; }
.made img.big { width: 104px; height: 104px; border: 1px solid var(--line); border-radius: 10px; }
.badge { display: inline-block; font-size: 11px; line-height: 1; padding: 3px 6px; border-radius: 99px; background: #eef1fc; color: var(--accent); margin-top: 4px; }
.badge.hidden { background: #fbeee4; color: var(--warm); }
ul { margin: 8px 0 0; padding-left: 20px; max-width: 80ch; }
li { margin-bottom: 6px; }
.scroll { overflow-x: auto; margin-bottom: 12px; }
footer { color: var(--soft); font-size: 13.5px; margin-top: 26px; }
"""


def document(title: str, body: str, *, css: str = "") -> str:
    """A whole page around `body`; `css` comes behind the style sheet."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{CSS}{css}</style></head><body><main>{body}</main></body></html>"
    )
