"""One self-contained HTML page: escaping, style, tables and embedded images. It knows nothing of what the page says.

No script and nothing from a network: the page's own security policy forbids both, so that it opens the same anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.verdict { font-size: 1.15rem; border-left: .3rem solid #0072b2; padding: .6rem 1rem; background: #f3f7fa; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #999; }
td.best { font-weight: 700; }
figure { margin: 1.2rem 0 2rem; } img { max-width: 100%; height: auto; }
figcaption, .small { color: #555; font-size: .9rem; }
pre { background: #f6f6f6; padding: .7rem; overflow: auto; max-height: 24rem; font-size: .8rem; }
@media print { body { margin: 0; max-width: none; } figure, table { break-inside: avoid; } details { display: none; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, body: Iterable[str]) -> str:
    """The document."""
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(body) + "\n</body>\n</html>\n"


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, of a class of the style."""
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>"


def facts(pairs: Mapping[str, str]) -> str:
    """A list of names and values."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items()) + "</dl>"


def bullets(items: Iterable[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a cell that ends with a star is shown bold without it."""
    parts = ['<div class="wide"><table><thead><tr>', *(f"<th>{escape(name)}</th>" for name in header)]
    parts.append("</tr></thead><tbody>")
    parts += ("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return "".join([*parts, "</tbody></table></div>"])


def _cell(text: str) -> str:
    return f'<td class="best">{escape(text[:-1])}</td>' if text.endswith("*") else f"<td>{escape(text)}</td>"


def image(png: Path, alt: str, caption: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png.read_bytes()).decode("ascii")
    source = f'<img src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}">'
    return f"<figure>{source}<figcaption>{escape(caption)}</figcaption></figure>"


def folded(summary: str, text: str) -> str:
    """Text behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
