"""The tables and plots of `fgpt bench recipe --coordinate-check` and `--rate-transfer`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.errors import printable
from fgpt.report.document import ReportPart
from fgpt.report.plots import COLOURS, GREY, MARKERS, Picture, empty_figure, picture_name, png
from fgpt.report.records import read_measurements
from fgpt.report.tables import NONE, Table, TableRow, with_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WITH, WITHOUT = "mup", "standard"
COORDINATE_HEADERS = ("output of", "slope with muP", "without", "{0} to {1} with muP", "without")
COORDINATE_NOTE = (
    "Change of each activation from its initial value on one batch of validation data, after"
    " {steps} steps at the recipe's constant rate ({rates}): root mean square, mean over {seeds}"
    " seeds. slope: the exponent p of change = c width^p over the widths {widths}; 0: the same at"
    " every width. {low} to {high}: how many times as large the change is at width {high} as at"
    " {low}, which is muP's base."
)
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
class Slope:
    """How the change of an activation depends on the width."""

    exponent: float
    changes: list[list[float]]
    """After each step, of each width."""


@dataclass(frozen=True)
class About:
    """What records of both checks have in common."""

    title: str
    """For example `tiny, 4 layers, muon, bf16, 16 x 256 tokens a step, data/prepared/texts`."""
    hardware: str
    widths: list[int]
    """From narrow to wide; the first is muP's base."""
    rates: str
    """Of the recipe."""
    steps: int
    seeds: int


@dataclass(frozen=True)
class CoordinateRecord:
    """A coordinate check of one recipe on one machine."""

    about: About
    slopes: dict[str, dict[str, Slope]]
    """Activation -> with muP and without."""


@dataclass(frozen=True)
class RateCurve:
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

    about: About
    curves: list[RateCurve]
    """The first is muP's base, which is the same without muP."""


def _about(raw: dict[str, Any]) -> About:
    batch = f"{int(raw['global_batch'])} x {int(raw['seq_len'])} tokens a step"
    name = f"{raw['row']}, {int(raw['n_layer'])} layers, {raw['recipe']}, {raw['precision']}"
    named = {path.rpartition(".")[2]: float(rate) for path, rate in raw["rates"].items()
             if path.startswith("optimizer.")}  # fmt: skip
    rates = ", ".join(f"{key} {rate:g}" for key, rate in named.items())
    widths = [int(width) for width in raw["widths"]]
    if len(widths) < 2:
        raise ValueError("it has fewer than two widths")
    title, hardware = printable(f"{name}, {batch}, {raw['data']}"), printable(str(raw["hardware"]))
    return About(title, hardware, widths, printable(rates), int(raw["steps"]), int(raw["seeds"]))


def parse_coordinates(raw: dict[str, Any]) -> CoordinateRecord:
    """A line of a records file. Raises KeyError, TypeError and ValueError for a damaged one."""
    about, slopes = _about(raw), {}
    for name, found in raw["activations"].items():
        slopes[printable(str(name))] = {
            kind: Slope(
                float(found[kind]["slope"]),
                [[float(value) for value in changes] for changes in found[kind]["changes"]],
            )
            for kind in (WITH, WITHOUT)
        }
    wanted = [about.steps] * len(about.widths)
    every = [slope for kinds in slopes.values() for slope in kinds.values()]
    if not every or any([len(c) for c in slope.changes] != wanted for slope in every):
        raise ValueError("it has not a change for each width and step")
    if min(value for slope in every for changes in slope.changes for value in changes) < 0:
        raise ValueError("a change is below 0")
    if min(changes[-1] for slope in every for changes in slope.changes) == 0:
        raise ValueError("a last change is 0")
    return CoordinateRecord(about, slopes)


def parse_rates(raw: dict[str, Any]) -> RateRecord:
    """A line of a records file. Raises KeyError, TypeError and ValueError for a damaged one."""
    curves = [_curve(each) for each in raw["curves"]]
    if len(curves) < 2:
        raise ValueError("it has fewer than two curves")
    return RateRecord(_about(raw), curves)


def _curve(raw: dict[str, Any]) -> RateCurve:
    losses = {
        int(power): None if loss is None else float(loss)
        for power, loss in zip(raw["powers"], raw["losses"], strict=True)
    }
    best, vertex = int(raw["best"]), raw["vertex"]
    if losses[best] is None:
        raise ValueError("a best rate has no loss")
    vertex = None if vertex is None else float(vertex)
    return RateCurve(int(raw["d_model"]), bool(raw["mup"]), losses, best, vertex, raw["at_end"])


def read_coordinate_records(paths: Sequence[Path]) -> list[CoordinateRecord]:
    """The last record of each check on each machine; other lines are ignored. Raises UserError."""
    records = read_measurements(paths, "coordinate_check", parse_coordinates)
    return list({(r.about.hardware, r.about.title): r for r in records}.values())


def read_rate_records(paths: Sequence[Path]) -> list[RateRecord]:
    """The last record of each check on each machine; other lines are ignored. Raises UserError."""
    records = read_measurements(paths, "rate_transfer", parse_rates)
    return list({(r.about.hardware, r.about.title): r for r in records}.values())


def coordinate_tables(records: Sequence[CoordinateRecord]) -> str:
    """A table with its notes for each coordinate check."""
    texts = [text for record in records for text in with_notes(coordinate_table(record))]
    return "\n\n".join(texts) if texts else "Not measured."


def rate_tables(records: Sequence[RateRecord]) -> str:
    """A table with its notes for each rate transfer."""
    texts = [text for record in records for text in with_notes(rate_table(record))]
    return "\n\n".join(texts) if texts else "Not measured."


def coordinate_table(record: CoordinateRecord) -> Table:
    """The slope of each activation, with muP and without."""
    about = record.about
    low, high = about.widths[0], about.widths[-1]
    rows = []
    for name, kinds in record.slopes.items():
        slopes = [f"{kinds[kind].exponent:+.2f}" for kind in (WITH, WITHOUT)]
        last = [[changes[-1] for changes in kinds[kind].changes] for kind in (WITH, WITHOUT)]
        rows.append(TableRow([name, *slopes, *(f"{c[-1] / c[0]:.2f}" for c in last)], "measured"))
    note = COORDINATE_NOTE.format(
        steps=about.steps,
        rates=about.rates,
        seeds=about.seeds,
        widths=", ".join(map(str, about.widths)),
        low=low,
        high=high,
    )
    headers = [header.format(low, high) for header in COORDINATE_HEADERS]
    return Table(f"{about.title} ({about.hardware})", headers, rows, frozenset({0}), [note])


def rate_table(record: RateRecord) -> Table:
    """The best rate of each width, with muP and without, and how far it moved."""
    about, base = record.about, record.curves[0]
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
        RATE_NOTE.format(steps=about.steps, seeds=about.seeds, rates=about.rates, base=base.d_model)
    ]
    if any(curve.at_end for curve in record.curves):
        notes.append(
            "end of the grid: no rate beyond it was tried, where the loss may be lower still."
        )
    headers = [header.format(base.d_model) for header in RATE_HEADERS]
    return Table(f"{about.title} ({about.hardware})", headers, rows, frozenset({1}), notes)


def _loss_text(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"


def coordinate_parts(records: Sequence[CoordinateRecord]) -> list[ReportPart]:
    """A part of the report for each coordinate check."""
    return [
        ReportPart(
            f"coordinate check: {record.about.title}",
            tables=[coordinate_table(record)],
            pictures=[_coordinate_plot(record)],
        )
        for record in records
    ]


def rate_parts(records: Sequence[RateRecord]) -> list[ReportPart]:
    """A part of the report for each rate transfer."""
    return [
        ReportPart(
            f"rate transfer: {record.about.title}",
            tables=[rate_table(record)],
            pictures=[_rate_plot(record)],
        )
        for record in records
    ]


def _coordinate_plot(record: CoordinateRecord) -> Picture:
    """A panel for each activation: change over width, a line for each step, the last one dark."""
    about, columns = record.about, 4
    rows = math.ceil(len(record.slopes) / columns)
    figure = empty_figure(12, 3 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, kinds) in zip(panels, record.slopes.items(), strict=False):
        for kind, colour, label in ((WITHOUT, COLOURS[1], "without"), (WITH, COLOURS[0], "muP")):
            _draw_steps(axes, about.widths, kinds[kind], colour, label)
        axes.set_title(name, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(about.widths, [str(width) for width in about.widths])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in panels[len(record.slopes) :]:
        axes.set_visible(False)
    figure.supxlabel("d_model")
    figure.supylabel("change since the start, root mean square")
    title = f"{about.title}, steps 1 (light) to {about.steps} (dark)"
    figure.suptitle(f"{title}\n{about.hardware}", fontsize=10)
    words = [
        f"{name} {kinds[WITH].exponent:+.2f} and {kinds[WITHOUT].exponent:+.2f}"
        for name, kinds in record.slopes.items()
    ]
    alt = f"Change of activations over width, {title}: slopes with muP and without: "
    alt += f"{'; '.join(words)}."
    return Picture(picture_name("coordinates", about.title, about.hardware), alt, png(figure))


def _draw_steps(axes: Axes, widths: Sequence[int], slope: Slope, colour: str, label: str) -> None:
    """A line for each step, whose change may be 0 at first."""
    n_steps = len(slope.changes[0])
    for step in range(n_steps):
        points = [(w, c[step]) for w, c in zip(widths, slope.changes, strict=True) if c[step] > 0]
        last = step == n_steps - 1
        axes.plot(
            [width for width, _ in points],
            [change for _, change in points],
            color=colour,
            marker=MARKERS[label == "muP"] if last else None,
            markersize=4,
            alpha=(step + 2) / (n_steps + 1),
            linewidth=2 if last else 1,
            label=f"{label}: {slope.exponent:+.2f}" if last else None,
        )


def _rate_plot(record: RateRecord) -> Picture:
    """Loss over learning rate, a line for each width: with muP beside without."""
    about, base = record.about, record.curves[0]
    figure = empty_figure(11, 4.8)
    for axes, mup in zip(figure.subplots(1, 2, sharex=True, sharey=True), (True, False),
                         strict=True):  # fmt: skip
        for i, curve in enumerate([base, *(c for c in record.curves[1:] if c.mup == mup)]):
            _draw_curve(axes, curve, i)
        axes.axvline(2.0**base.best, color=GREY, linewidth=1, linestyle="--")
        axes.set_title("with muP" if mup else "without muP")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"learning rates, as factors of the recipe's ({about.rates})")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="d_model")
        if mup:
            axes.set_ylabel(f"validation loss after {about.steps} steps, nats per token")
            _limit(axes, record.curves)
    figure.suptitle(f"{about.title}\n{about.hardware}", fontsize=10)
    words = [f"{row.cells[0]} {row.cells[1]} {row.cells[2]}" for row in rate_table(record).rows]
    alt = f"Validation loss over learning rate by width, {about.title}: best factors of the"
    alt += f" recipe's rates by width and muP: {'; '.join(words)}."
    return Picture(picture_name("rates", about.title, about.hardware), alt, png(figure))


def _draw_curve(axes: Axes, curve: RateCurve, number: int) -> None:
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


def _limit(axes: Axes, curves: Sequence[RateCurve]) -> None:
    """Show all losses but those far above: they would flatten the rest."""
    losses = sorted(loss for curve in curves for loss in curve.losses.values() if loss is not None)
    low = losses[0]
    span = 2.5 * (losses[len(losses) // 2] - low) + 0.05
    axes.set_ylim(low - 0.05 * span, low + min(span, 1.05 * (losses[-1] - low) + 0.01))
