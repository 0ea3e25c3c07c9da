"""The whole report: its parts in order, as Markdown and as one HTML file.

The HTML file embeds its pictures and needs neither scripts nor the network.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from fgpt.report.plots import COLOURS, Picture, bar_chart, ladder_plot, scaling_plot, slug
from fgpt.report.records import Record
from fgpt.report.report_tables import report_tables, scaling_sentences, unmeasured_sections
from fgpt.report.tables import Table, TableRow, percent

TITLE = "FGPT: measured speed and memory"
VARIANTS = "The variants"


Breakdown = tuple[str, dict[str, float]]
"""Title, and the fractions of a step's time."""


@dataclass(frozen=True)
class ReportPart:
    """A benchmark on one machine, or sentences about all of them."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    variants: Sequence[str] = ()
    """Name and description of each variant."""
    breakdowns: Sequence[Breakdown] = ()


def report_parts(records: Sequence[Record]) -> list[ReportPart]:
    """All parts, GPUs first within each benchmark. `records`: in the report's order."""
    groups = groupby(records, key=lambda record: record.table[:2])
    parts = [_machine_part(list(group)) for _, group in groups]
    parts.append(ReportPart("Scaling", scaling_sentences(records)))
    missing = unmeasured_sections(records)
    return [*parts, *([ReportPart("Not measured", missing)] if missing else [])]


def _machine_part(records: list[Record]) -> ReportPart:
    bench, hardware, _ = records[0].table
    lines = ladder_plot(records) if bench == "single" else scaling_plot(records)
    models = dict.fromkeys(record.workload for record in records if record.measurement)
    bars = [bar_chart([record for record in records if record.workload == m]) for m in models]
    described = [
        f"{record.env_name}: {record.description}" for record in records if record.description
    ]
    return ReportPart(
        title=f"{bench}: {hardware}",
        tables=report_tables(records),
        pictures=[*([lines] if lines else []), *bars],
        variants=list(dict.fromkeys(described)),
        breakdowns=_breakdowns(records),
    )


def _breakdowns(records: Sequence[Record]) -> list[Breakdown]:
    """By kind of kernel where a trace was recorded, by activity in the multi benchmark."""
    breakdowns = []
    for record in records:
        if record.measurement is None:
            continue
        title = f"{record.workload}, {record.env_name}"
        for kind, fractions in (
            ("kernels", record.measurement.trace),
            ("step", record.measurement.breakdown),
        ):
            if fractions:
                breakdowns.append((f"{title}: {kind}", fractions))
    return breakdowns


def to_markdown(parts: Sequence[ReportPart]) -> str:
    """The text of table.md: tables, notes, and links to the pictures beside it."""
    lines = [f"# {TITLE}"]
    for part in parts:
        lines += [f"## {part.title}", *part.texts]
        for table in part.tables:
            lines += [f"### {table.title}", table.markdown(), *table.notes]
        lines += [f"![{picture.alt}]({picture.name})" for picture in part.pictures]
        if part.variants:
            lines += [f"### {VARIANTS}", "\n".join(f"- {text}" for text in part.variants)]
    return "\n\n".join(lines) + "\n"


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


def to_html(parts: Sequence[ReportPart], title: str = TITLE) -> str:
    """The text of a page, index.html for one."""
    links = "".join(f'<li><a href="#{slug(p.title)}">{escape(p.title)}</a></li>' for p in parts)
    body = "\n".join(map(_html_part, parts))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<nav aria-label="Parts"><ul>{links}</ul></nav>
<main>
{body}
</main>
</body>
</html>
"""


def _html_part(part: ReportPart) -> str:
    name = slug(part.title)
    blocks = [f'<section id="{name}" aria-labelledby="{name}-title">']
    blocks += [f'<h2 id="{name}-title">{escape(part.title)}</h2>', *_paragraphs(part.texts)]
    blocks += [_html_picture(picture) for picture in part.pictures]
    blocks += [_html_table(table) for table in part.tables]
    if part.breakdowns:
        blocks += ["<h3>Where the time of a step goes</h3>", *_html_breakdowns(part.breakdowns)]
    if part.variants:
        items = "".join(f"<li>{escape(text)}</li>" for text in part.variants)
        blocks += [f"<h3>{VARIANTS}</h3>", f"<ul>{items}</ul>"]
    return "\n".join([*blocks, "</section>"])


def _paragraphs(texts: Iterable[str], attributes: str = "") -> list[str]:
    return [f"<p{attributes}>{escape(text)}</p>" for text in texts]


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}"></figure>'


def _html_table(table: Table) -> str:
    """The table in a region that scrolls sideways, by keyboard, too; then its notes."""
    heads = "".join(
        f'<th scope="col"{_cell_class(i, table)}>{escape(head)}</th>'
        for i, head in enumerate(table.headers)
    )
    name = slug(table.title)
    return "\n".join(
        [
            f'<h3 id="{name}">{escape(table.title)}</h3>',
            f'<div class="wide" tabindex="0" role="region" aria-labelledby="{name}">',
            f'<table aria-labelledby="{name}"><thead><tr>{heads}</tr></thead>',
            "<tbody>",
            *(_html_row(row, table) for row in table.rows),
            "</tbody></table></div>",
            *_paragraphs(table.notes, ' class="note"'),
        ]
    )


def _html_row(row: TableRow, table: Table) -> str:
    first, *rest = row.cells
    cells = "".join(
        f"<td{_cell_class(i, table)}>{escape(text)}</td>" for i, text in enumerate(rest, 1)
    )
    head = f'<th scope="row"{_cell_class(0, table)}>{escape(first)}</th>'
    return f'<tr class="{escape(row.state)}">{head}{cells}</tr>'


def _cell_class(i: int, table: Table) -> str:
    return ' class="text"' if i in table.text_columns else ""


def _html_breakdowns(breakdowns: Sequence[Breakdown]) -> list[str]:
    """Stacked bars, each kind in the same colour in all of them, and a key with the values."""
    kinds = dict.fromkeys(kind for _, fractions in breakdowns for kind in fractions)
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    return [_html_breakdown(*breakdown, colours) for breakdown in breakdowns]


def _html_breakdown(title: str, fractions: dict[str, float], colours: Mapping[str, str]) -> str:
    total = max(sum(fractions.values()), 1.0)  # time of no kind stays empty
    bar = "".join(
        f'<div style="width:{100 * fraction / total:.2f}%;background:{colours[kind]}"></div>'
        for kind, fraction in fractions.items()
    )
    texts = {kind: f"{kind} {percent(fraction)}" for kind, fraction in fractions.items()}
    key = "".join(
        f'<span><i style="background:{colours[kind]}"></i>{escape(text)}</span>'
        for kind, text in texts.items()
    )
    label = escape(f"{title}: {', '.join(texts.values())}")
    return (
        f'<div class="share"><div>{escape(title)}</div>'
        f'<div class="bar" role="img" aria-label="{label}">{bar}</div>'
        f'<div class="key" aria-hidden="true">{key}</div></div>'
    )
