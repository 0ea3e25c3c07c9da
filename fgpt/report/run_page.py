"""One HTML page of training runs: curves, samples, configuration, lineage. It loads nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from fgpt.config.deepspeed.settings import leaf_values
from fgpt.report.run_record import RunRecord
from fgpt.report.run_series import Chart, charts_of, evenly, series_of
from fgpt.report.run_summary import describe, duration, summary_of
from fgpt.utils.keys import shown

if TYPE_CHECKING:
    from fgpt.checkpoint.manifest import Start

HERE = Path(__file__).parent
MAX_SAMPLES = 40
"""Of a run, at equal distances."""


def run_page(runs: Sequence[RunRecord], refresh_s: int | None = None) -> str:
    """Return the page. `refresh_s`: the browser renews it so often."""
    data = [series_of(run) for run in runs]
    charts = charts_of(runs, data)
    entries = [{"name": run.name, "series": series} for run, series in zip(runs, data, strict=True)]
    shown_charts = [vars(chart) for chart in charts]
    embedded = json.dumps({"runs": entries, "charts": shown_charts}, separators=(",", ":"))
    renew = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        _controls(runs),
        '<div class="charts">' + "".join(map(_figure, charts)) + "</div>",
        "<noscript><p>The charts need JavaScript; the tables have the numbers.</p></noscript>",
        _section("Summary", _summary(runs)),
        _section("Samples", "".join(map(_samples, runs))),
        _section("Lineage", "".join(map(_lineage, runs))),
        _section("Configuration", _configuration(runs)),
    ]
    script = embedded.replace("<", "\\u003c")  # no text in it ends the element, or begins a comment
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{renew}
<title>FGPT: {escape(title)}</title>
<style>
{(HERE / "run_page.css").read_text()}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{"".join(_headline(run) for run in runs)}
{"".join(parts)}
<script type="application/json" id="data">{script}</script>
<script>
{(HERE / "run_page.js").read_text()}</script>
</body>
</html>
"""


# ---- charts ------------------------------------------------------------------------------------


def _figure(chart: Chart) -> str:
    kind = "large" if chart.key == "loss" else "small"
    unit = f" <span>({escape(chart.unit)})</span>" if chart.unit else ""
    return (
        f'<figure class="{kind}" id="chart-{chart.key}"><figcaption>{escape(chart.title)}{unit}'
        f'</figcaption><svg role="img" aria-label="{escape(chart.title)}"></svg>'
        '<div class="values" hidden></div></figure>'
    )


def _controls(runs: Sequence[RunRecord]) -> str:
    axes = "".join(
        f'<label><input type="radio" name="axis" value="{value}"> {text}</label>'
        for value, text in (("step", "steps"), ("tokens", "tokens"), ("hours", "time"))
    )
    names = "".join(
        f'<label><input type="checkbox" name="run" value="{escape(run.name)}">'
        f'<span class="swatch" style="background:var(--c{i % 8})"></span>{escape(run.name)}</label>'
        for i, run in enumerate(runs)
    )
    visible = f'<fieldset class="runs"><legend>runs</legend>{names}</fieldset>'
    return (
        f'<div class="controls"><fieldset><legend>against</legend>{axes}</fieldset>'
        '<label>smoothing <input type="range" id="smoothing" min="0" max="0.99" step="0.01">'
        f"</label>{visible if len(runs) > 1 else ''}</div>"
    )


# ---- tables and texts --------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _headline(run: RunRecord) -> str:
    age = f"last record {duration(run.age_s)} ago"
    return f'<p class="dim">{escape(f"{run.path}: {describe(run)}; {run.state}, {age}")}</p>'


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str], bool]]) -> str:
    """Rows: name, cells, and whether the row is marked."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr{" class=differs" if marked else ""}><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells, marked in rows
    )
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _summary(runs: Sequence[RunRecord]) -> str:
    columns = [summary_of(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "") for column in columns], False) for name in names]
    return _table(["", *(run.name for run in runs)], rows)


def _samples(run: RunRecord) -> str:
    items = [
        f"<details{' open' if sample is run.samples[-1] else ''}><summary>{escape(run.name)}, step"
        f" {sample.step:,}</summary><pre><b>{escape(sample.prompt)}</b>{escape(sample.text)}</pre>"
        "</details>"
        for sample in reversed(evenly(run.samples, MAX_SAMPLES))
    ]
    return "".join(items)


def _lineage(run: RunRecord) -> str:
    if not run.starts:
        return ""
    before = [None, *run.starts]
    rows = [
        (f"step {start.step:,}", [f"{start.tokens:,}", *_start(start, earlier)], False)
        for earlier, start in zip(before, run.starts, strict=False)
    ]
    table = _table(["began at", "tokens seen", "layout", "changed"], rows)
    return f"<h3>{escape(run.name)}</h3>{table}"


def _start(start: Start, earlier: Start | None) -> tuple[str, str]:
    """The layout, and what is not as in the start before."""
    layout = ", ".join(f"{k} {v}" for k, v in start.layout.items() if v is not None)
    changes = [f"weights: {start.origin}"] if start.origin else []
    if earlier is not None:
        changes += [
            f"{name}: {earlier.layout.get(name)} -> {value}"
            for name, value in start.layout.items()
            if value != earlier.layout.get(name)
        ]
    return layout, "; ".join([*changes, *start.changes])


def _configuration(runs: Sequence[RunRecord]) -> str:
    """Every value with its origin; those that differ between the runs first, marked."""
    columns = [_values(run) for run in runs]
    names = sorted({name for column in columns for name in column})
    rows = []
    for name in names:
        cells = [column.get(name, ("absent", "")) for column in columns]
        differs = len({value for value, _ in cells}) > 1
        texts = [f"{value} ({origin})" if origin else value for value, origin in cells]
        rows.append((name, texts, differs))
    rows.sort(key=lambda row: not row[2])
    if not rows:
        return ""
    table = _table(["", *(run.name for run in runs)], rows)
    n = sum(differs for _, _, differs in rows)
    what = f"{len(rows)} values" + (f", {n} differ" if len(runs) > 1 else "")
    return f"<details{' open' if n else ''}><summary>{what}</summary>{table}</details>"


def _values(run: RunRecord) -> dict[str, tuple[str, str]]:
    """Dotted name -> value and origin."""
    origins, values = run.section("origins"), {}
    for section in ("run", "deepspeed"):
        for path, value in leaf_values(run.section(section)):
            name = f"{section}.{path}"
            values[name] = (shown(value), str(origins.get(name, "")))
    return values
