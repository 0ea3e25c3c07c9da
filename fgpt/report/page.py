"""The report as one HTML file: pictures inside, no scripts, nothing from the network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from fgpt.report.canvas import COLOURS, Picture, slug
from fgpt.report.cells import percent
from fgpt.report.contents import TITLE, Part, Share
from fgpt.report.tables import Row, Table

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --paper: #ffffff; --line: #c9c9c9;
  --soft: #f2f4f7; --wrong: #b3261e; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --paper: #16181c; --line: #454a52; --soft: #22262c;
    --wrong: #ff8a80; --link: #8ab8ee; } }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.25rem 4rem; color: var(--text);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
p, li { max-width: 60rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; }
thead th { background: var(--soft); vertical-align: bottom; min-width: 4.5rem; }
tbody th { font-weight: 600; white-space: nowrap; position: sticky; left: 0;
  background: var(--paper); }
th.text, td.text { text-align: left; }
td { white-space: nowrap; }
tr.wrong th, tr.wrong td { color: var(--wrong); }
tr.skipped td, tr.failed td { font-style: italic; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
figure { margin: 1.5rem 0; }
.note { font-size: 0.85rem; margin: 0.3rem 0; }
.share { margin: 0.5rem 0; }
.bar { display: flex; height: 1.1rem; max-width: 60rem; border: 1px solid var(--line); }
.key { font-size: 0.8rem; }
.key span { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.3em; }
"""


def page(parts: Sequence[Part]) -> str:
    """The whole file."""
    links = "".join(f'<li><a href="#{slug(p.title)}">{escape(p.title)}</a></li>' for p in parts)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(TITLE)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(TITLE)}</h1>",
            f'<nav aria-label="Parts"><ul>{links}</ul></nav>',
            "<main>",
            *map(_part, parts),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _part(part: Part) -> str:
    name = slug(part.title)
    pieces = [f'<section id="{name}" aria-labelledby="{name}-title">']
    pieces += [f'<h2 id="{name}-title">{escape(part.title)}</h2>', *_paragraphs(part.texts)]
    pieces += [_picture(picture) for picture in part.pictures]
    pieces += [_table(table) for table in part.tables]
    if part.shares:
        pieces += ["<h3>Where the time of a step goes</h3>", *_shares(part.shares)]
    if part.rungs:
        items = "".join(f"<li>{escape(rung)}</li>" for rung in part.rungs)
        pieces += ["<h3>What each rung is</h3>", f"<ul>{items}</ul>"]
    return "\n".join([*pieces, "</section>"])


def _paragraphs(texts: Iterable[str], kind: str = "") -> list[str]:
    return [f"<p{kind}>{escape(text)}</p>" for text in texts]


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}"></figure>'


def _table(table: Table) -> str:
    """In a box of its own that scrolls sideways, by keyboard, too."""
    heads = "".join(
        f'<th scope="col"{_kind(i, table)}>{escape(head)}</th>'
        for i, head in enumerate(table.headers)
    )
    name = slug(table.title)
    return "\n".join(
        [
            f'<h3 id="{name}">{escape(table.title)}</h3>',
            f'<div class="wide" tabindex="0" role="region" aria-labelledby="{name}">',
            f'<table aria-labelledby="{name}"><thead><tr>{heads}</tr></thead>',
            "<tbody>",
            *(_row(row, table) for row in table.rows),
            "</tbody></table></div>",
            *_paragraphs(table.notes, ' class="note"'),
        ]
    )


def _row(row: Row, table: Table) -> str:
    first, *rest = row.cells
    cells = "".join(f"<td{_kind(i, table)}>{escape(cell)}</td>" for i, cell in enumerate(rest, 1))
    return (
        f'<tr class="{escape(row.state)}"><th scope="row"{_kind(0, table)}>{escape(first)}</th>'
        f"{cells}</tr>"
    )


def _kind(i: int, table: Table) -> str:
    return ' class="text"' if i in table.text_columns else ""


def _shares(shares: Sequence[Share]) -> list[str]:
    """Stacked bars, each kind in one colour throughout; the key under each has the figures."""
    kinds = dict.fromkeys(kind for share in shares for kind in share.parts)
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    return [_share(share, colours) for share in shares]


def _share(share: Share, colours: Mapping[str, str]) -> str:
    whole = max(sum(share.parts.values()), 1.0)  # what no kind accounts for stays empty
    bar = "".join(
        f'<div style="width:{100 * part / whole:.2f}%;background:{colours[kind]}"></div>'
        for kind, part in share.parts.items()
    )
    key = "".join(
        f'<span><i style="background:{colours[kind]}"></i>{escape(kind)} {percent(part)}</span>'
        for kind, part in share.parts.items()
    )
    words = ", ".join(f"{kind} {percent(part)}" for kind, part in share.parts.items())
    label = escape(f"{share.title}: {words}")
    return (
        f'<div class="share"><div>{escape(share.title)}</div>'
        f'<div class="bar" role="img" aria-label="{label}">{bar}</div>'
        f'<div class="key" aria-hidden="true">{key}</div></div>'
    )
