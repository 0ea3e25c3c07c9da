"""One HTML page of training runs: curves, samples, configuration, lineage. It loads nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.config.deepspeed.settings import leaf_values
from fgpt.report.run_record import RunRecord, finite
from fgpt.utils.keys import shown

if TYPE_CHECKING:
    from fgpt.checkpoint.manifest import Start

MAX_POINTS = 1500
"""Of a line; of longer runs each point is the mean of equally many steps."""
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Chart:
    """One chart of the page."""

    key: str
    title: str
    unit: str
    series: tuple[str, ...]
    """Names of the values in a run's records."""
    log: bool = False
    """Whether its vertical axis is logarithmic."""
    zero: bool = False
    """Whether its vertical axis begins at 0."""


CHARTS = (
    Chart("loss", "Loss", "nats per token", ("loss", "valid_loss")),
    Chart("rate", "Learning rate", "", ("learning_rate",), zero=True),
    Chart("norm", "Gradient norm", "before clipping, logarithmic", ("grad_norm",), log=True),
    Chart("speed", "Throughput", "tokens/s", ("tokens_per_s",), zero=True),
    Chart("mfu", "Model FLOPs utilization", "of the device's peak", ("mfu",), zero=True),
    Chart("memory", "Peak memory", "GiB, rank 0", ("memory_gib",), zero=True),
    Chart("wait", "Waiting for data", "share of the time", ("data_wait",), zero=True),
    Chart("skipped", "Skipped steps", "so far", ("skipped_so_far",), zero=True),
    Chart("scale", "Loss scale", "fp16, logarithmic", ("loss_scale",), log=True),
)


def run_page(runs: Sequence[RunRecord], refresh_s: int | None = None) -> str:
    """Return the page. `refresh_s`: the browser renews it so often."""
    data = [_series(run) for run in runs]
    names = dict.fromkeys(name for run in runs for name in run.records.suites)
    suites = [
        Chart(f"suite-{i}", name, "accuracy", (f"suite {name}",)) for i, name in enumerate(names)
    ]
    charts = [c for c in (*CHARTS, *suites) if any(_has(each, c) for each in data)]
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
    script = embedded.replace("</", "<\\/")  # a text in it must not end the element
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


# ---- curves ------------------------------------------------------------------------------------


def _series(run: RunRecord) -> dict[str, Any]:
    """Name of a value -> its places on each axis, and the values."""
    hours = [seconds / 3600 for seconds in accumulate(r["step_s"] for r in run.records.steps)]
    numbers = [record["step"] for record in run.records.steps]
    x = {"step": numbers, "tokens": [run.tokens(n) for n in numbers], "hours": hours}
    skipped = list(accumulate(int(record["skipped"]) for record in run.records.steps))
    columns: dict[str, list[float | None]] = {
        name: finite([_number(record.get(name)) for record in run.records.steps])
        for name in {name for chart in CHARTS for name in chart.series}
    }
    columns["loss"] = finite([None if r["skipped"] else r["loss"] for r in run.records.steps])
    columns["skipped_so_far"] = [*map(float, skipped)] if any(skipped) else []
    places = _thinned(x)
    series: dict[str, Any] = {
        name: {"x": places, "y": _means(values)}
        for name, values in columns.items()
        if any(value is not None for value in values)
    }
    at = dict(zip(numbers, hours, strict=True))
    measured = {"valid_loss": run.records.evaluations}
    measured |= {f"suite {name}": points for name, points in run.records.suites.items()}
    for name, points in measured.items():
        steps = [step for step, _ in points]
        at_steps = {
            "step": steps,
            "tokens": [run.tokens(step) for step in steps],
            "hours": [at.get(step, 0.0) for step in steps],
        }
        if points:
            series[name] = {"x": at_steps, "y": finite([y for _, y in points]), "measured": True}
    return series


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) else None


def _bucket(n: int) -> int:
    """Steps of one point."""
    return max(1, -(-n // MAX_POINTS))


def _thinned(x: dict[str, list[float]]) -> dict[str, list[float]]:
    size = _bucket(len(x["step"]))
    return {
        axis: [places[min(i + size, len(places)) - 1] for i in range(0, len(places), size)]
        for axis, places in x.items()
    }


def _means(values: Sequence[float | None]) -> list[float | None]:
    size = _bucket(len(values))
    groups = (
        [v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)
    )
    return [float(f"{statistics.fmean(group):.6g}") if group else None for group in groups]


def _has(series: dict[str, Any], chart: Chart) -> bool:
    return any(name in series for name in chart.series)


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
    age = f"last record {_duration(run.age_s)} ago"
    return f'<p class="dim">{escape(f"{run.path}: {describe(run)}; {run.state}, {age}")}</p>'


def describe(run: RunRecord) -> str:
    """Model, engine, precision and ranks in words."""
    batch = run.section("batch")
    is_plain = run.section("run", "train").get("engine") == "plain"
    engine = "plain engine" if is_plain else f"ZeRO-{run.config.get('zero_stage', '?')}"
    grid = "".join(
        f", {axis} {batch[axis]}" for axis in ("tp", "pp", "cp") if batch.get(axis, 1) != 1
    )
    where = f"{batch.get('world', '?')} rank(s) on {run.config.get('device', '?')}"
    return f"{run.model}, {engine}, {run.config.get('precision', '?')}{grid}, {where}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def summary_of(run: RunRecord) -> dict[str, str]:
    """Name -> text, of the numbers that one compares runs by."""
    steps, losses = run.records.steps, [loss for _, loss in run.records.evaluations]
    rows = {"model": describe(run), "state": run.state}
    last = steps[-1]["step"] if steps else 0
    rows["steps"] = f"{last:,}" + (f" of {run.last_step:,}" if run.last_step else "")
    rows["tokens"] = f"{run.tokens(last):,}"
    rows["time of steps"] = _duration(sum(record["step_s"] for record in steps))
    trained = [record for record in steps if not record["skipped"]]
    if trained:
        rows["training loss"] = f"{trained[-1]['loss']:.4f}"
    if losses:
        best = min(run.records.evaluations, key=lambda pair: pair[1])
        rows["validation loss"] = f"{losses[-1]:.4f}"
        rows["lowest validation loss"] = f"{best[1]:.4f} at step {best[0]:,}"
    speeds = [r["tokens_per_s"] for r in steps if _number(r.get("tokens_per_s"))]
    if speeds:
        rows["throughput, median"] = f"{statistics.median(speeds):,.0f} tokens/s"
    memory = [r["memory_gib"] for r in steps if _number(r.get("memory_gib"))]
    if memory:
        rows["peak memory"] = f"{max(memory):.2f} GiB (rank 0)"
    waits = [r["data_wait_s"] for r in steps if _number(r.get("data_wait_s"))]
    if waits:
        total_s = sum(record["step_s"] for record in steps) or 1
        rows["waiting for data"] = f"{sum(waits) / total_s:.1%}"
    rows["skipped steps"] = f"{sum(record['skipped'] for record in steps):,}"
    return rows


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
        for sample in reversed(run.samples)
    ]
    return "".join(items)


def _lineage(run: RunRecord) -> str:
    if not run.starts:
        return ""
    rows = [(f"step {s.step:,}", [f"{s.tokens:,}", *_start(s)], False) for s in run.starts]
    table = _table(["began at", "tokens seen", "layout", "changed"], rows)
    return f"<h3>{escape(run.name)}</h3>{table}"


def _start(start: Start) -> tuple[str, str]:
    layout = ", ".join(f"{k} {v}" for k, v in start.layout.items() if v is not None)
    origin = [f"weights of {start.origin}"] if start.origin else []
    return layout, "; ".join([*origin, *start.changes]) or "nothing"


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
