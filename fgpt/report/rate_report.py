"""The table and plot of `fgpt bench recipe --rate-transfer`: loss over learning rate by width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.report.coordinate_report import WidthRuns, parse_runs
from fgpt.report.document import ReportPart
from fgpt.report.plots import COLOURS, GREY, MARKERS, Picture, empty_figure, picture_name, png
from fgpt.report.records import read_measurements
from fgpt.report.tables import NONE, Table, TableRow, with_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATE_HEADERS = ("width", "muP", "best rates, x", "moved by", "parabola's", "validation loss",
                "with {0}'s best")  # fmt: skip
RATE_NOTE = (
    "Validation loss after {steps} steps with the recipe's schedule, of each width with each rate"
    " of a grid, a factor of 2 apart, on the same samples; seeds: {seeds}. best rates: of the"
    " lowest loss, as a factor of the recipe's ({rates}). moved by: grid steps from the best of"
    " width {base}, which is muP's base. parabola's: the same of the lowest points of the"
    " parabolas through the best losses and their neighbours. with {base}'s best: the loss at the"
    " rates that are the best at width {base}."
)


@dataclass(frozen=True)
class RecordedCurve:
    """The losses of one model by learning rate."""

    d_model: int
    mup: bool
    losses: dict[int, float | None]
    """Power of 2 by which the recipe's rates are multiplied -> loss; None: it diverged."""
    best: int
    vertex: float | None
    at_end: bool


@dataclass(frozen=True)
class RateRecord:
    """A rate transfer of one recipe on one machine."""

    runs: WidthRuns
    curves: list[RecordedCurve]
    """The first is muP's base, which is the same without muP."""


def read_rate_records(paths: Sequence[Path]) -> list[RateRecord]:
    """The last record of each check on each machine; other lines are ignored. Raises UserError."""
    records = read_measurements(paths, "rate_transfer", parse_rates)
    return list({(r.runs.hardware, r.runs.title): r for r in records}.values())


def parse_rates(raw: dict[str, Any]) -> RateRecord:
    """A line of a records file. Raises KeyError, TypeError and ValueError for a damaged one."""
    curves = [_curve(each) for each in raw["curves"]]
    if len(curves) < 2:
        raise ValueError("it has fewer than two curves")
    return RateRecord(parse_runs(raw), curves)


def _curve(raw: dict[str, Any]) -> RecordedCurve:
    losses = {
        int(power): None if loss is None else float(loss)
        for power, loss in zip(raw["powers"], raw["losses"], strict=True)
    }
    best, vertex = int(raw["best"]), raw["vertex"]
    if losses[best] is None:
        raise ValueError("a best rate has no loss")
    vertex = None if vertex is None else float(vertex)
    return RecordedCurve(int(raw["d_model"]), bool(raw["mup"]), losses, best, vertex, raw["at_end"])


def rate_tables(records: Sequence[RateRecord]) -> str:
    """A table with its notes for each rate transfer."""
    texts = [text for record in records for text in with_notes(rate_table(record))]
    return "\n\n".join(texts) if texts else "Not measured."


def rate_table(record: RateRecord) -> Table:
    """The best rate of each width, with muP and without, and how far it moved."""
    runs, base = record.runs, record.curves[0]
    rows = []
    for curve in record.curves:
        loss, transferred = curve.losses[curve.best], NONE
        if base.best in curve.losses:
            transferred = _loss_text(curve.losses[base.best])
        moved = vertex = NONE
        if curve is not base:
            moved = f"{curve.best - base.best:+d}"
            if curve.vertex is not None and base.vertex is not None:
                vertex = f"{curve.vertex - base.vertex:+.1f}"
        kind = "base" if curve is base else "with" if curve.mup else "without"
        best = f"{2.0**curve.best:g}" + (" (end of the grid)" if curve.at_end else "")
        cells = [str(curve.d_model), kind, best, moved, vertex, f"{loss:.3f}"]
        rows.append(TableRow([*cells, transferred], "measured"))
    notes = [
        RATE_NOTE.format(steps=runs.steps, seeds=runs.seeds, rates=runs.rates, base=base.d_model)
    ]
    if any(curve.at_end for curve in record.curves):
        notes.append(
            "end of the grid: no rate beyond it was tried, where the loss may be lower still."
        )
    headers = [header.format(base.d_model) for header in RATE_HEADERS]
    return Table(f"{runs.title} ({runs.hardware})", headers, rows, frozenset({1}), notes)


def _loss_text(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"


def rate_parts(records: Sequence[RateRecord]) -> list[ReportPart]:
    """A part of the report for each rate transfer."""
    return [
        ReportPart(
            f"rate transfer: {record.runs.title}",
            tables=[rate_table(record)],
            pictures=[_plot(record)],
        )
        for record in records
    ]


def _plot(record: RateRecord) -> Picture:
    """Loss over learning rate, a line for each width: with muP beside without."""
    runs, base = record.runs, record.curves[0]
    figure = empty_figure(11, 4.8)
    for axes, mup in zip(figure.subplots(1, 2, sharex=True, sharey=True), (True, False),
                         strict=True):  # fmt: skip
        for i, curve in enumerate([base, *(c for c in record.curves[1:] if c.mup == mup)]):
            _draw_curve(axes, curve, i)
        axes.axvline(2.0**base.best, color=GREY, linewidth=1, linestyle="--")
        axes.set_title("with muP" if mup else "without muP")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"learning rates, as factors of the recipe's ({runs.rates})")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="d_model")
        if mup:
            axes.set_ylabel(f"validation loss after {runs.steps} steps, nats per token")
            _limit(axes, record.curves)
    figure.suptitle(f"{runs.title}\n{runs.hardware}", fontsize=10)
    words = [f"{row.cells[0]} {row.cells[1]} {row.cells[2]}" for row in rate_table(record).rows]
    alt = f"Validation loss over learning rate by width, {runs.title}: best factors of the"
    alt += f" recipe's rates by width and muP: {'; '.join(words)}."
    return Picture(picture_name("rates", runs.title, runs.hardware), alt, png(figure))


def _draw_curve(axes: Axes, curve: RecordedCurve, number: int) -> None:
    """Its points, and a star at the best."""
    points: Mapping[int, float] = {p: loss for p, loss in curve.losses.items() if loss is not None}
    colour = COLOURS[number % len(COLOURS)]
    axes.plot(
        [2.0**power for power in points],
        list(points.values()),
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        label=str(curve.d_model),
    )
    axes.plot(2.0**curve.best, points[curve.best], "*", color=colour, markersize=16)


def _limit(axes: Axes, curves: Sequence[RecordedCurve]) -> None:
    """Show all losses but those far above: they would flatten the rest."""
    losses = sorted(loss for curve in curves for loss in curve.losses.values() if loss is not None)
    low = losses[0]
    span = 2.5 * (losses[len(losses) // 2] - low) + 0.05
    axes.set_ylim(low - 0.05 * span, low + min(span, 1.05 * (losses[-1] - low) + 0.01))
