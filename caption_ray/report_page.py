"""HTML pages that need nothing beside them: the report of an evaluation, the card of a data set."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

STYLE = """
:root { color-scheme: light dark; --ink: #1d1a17; --soft: #6b645c; --paper: #faf8f5; --card: #fff;
        --line: #e3ddd4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ece7e0; --soft: #a59d93; --paper: #171513; --card: #211e1b; --line: #38332d; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1100px; margin: 3rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 3rem; }
p.soft, small, figcaption { color: var(--soft); }
table { border-collapse: collapse; } td { padding: .2rem 1.5rem .2rem 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr td { border-top: 1px solid var(--line); }
img { max-width: 100%; border-radius: 6px; display: block; }
.cards { display: grid; gap: 1.25rem;
         grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
        padding: 1rem; }
.card b { display: block; margin: .6rem 0 .3rem; font-weight: 600; }
.words { display: flex; flex-wrap: wrap; gap: .75rem; } .words figure { margin: 0; width: 120px; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page: the title as heading, and under it parts that are HTML already."""
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    viewport = '<meta name=viewport content="width=device-width">'
    body = f"<h1>{html.escape(title)}</h1>{''.join(parts)}"
    return f"<!doctype html><html lang=en>{head}{viewport}<body>{body}</html>"


def image(data: bytes, kind: str, text: str) -> str:
    """A picture within the page; `text` says what is on it."""
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{encoded}">'
