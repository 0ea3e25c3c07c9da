"""The table and plot of `fgpt bench recipe --coordinate-check`: change of activations by width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.errors import printable
from fgpt.report.document import ReportPart
from fgpt.report.plots import COLOURS, MARKERS, Picture, empty_figure, picture_name, png
from fgpt.report.records import read_measurements
from fgpt.report.tables import Table, TableRow, with_notes

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


@dataclass(frozen=True)
class Slope:
    """How the change of an activation depends on the width."""

    exponent: float
    changes: list[list[float]]
    """After each step, of each width."""


@dataclass(frozen=True)
class WidthRuns:
    """What records of both checks have in common."""

    title: str
    """For example `tiny, 4 layers, muon, bf16, 4 x 256 tokens a step, data/prepared/texts, d_model
    128, 512`."""
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

    runs: WidthRuns
    slopes: dict[str, dict[str, Slope]]
    """Activation -> with muP and without."""


def read_coordinate_records(paths: Sequence[Path]) -> list[CoordinateRecord]:
    """The last record of each check on each machine; other lines are ignored. Raises UserError."""
    records = read_measurements(paths, "coordinate_check", parse_coordinates)
    return list({(r.runs.hardware, r.runs.title): r for r in records}.values())


def parse_coordinates(raw: dict[str, Any]) -> CoordinateRecord:
    """A line of a records file. Raises KeyError, TypeError and ValueError for a damaged one."""
    runs, slopes = parse_runs(raw), {}
    for name, found in raw["activations"].items():
        slopes[printable(str(name))] = {
            kind: Slope(
                float(found[kind]["slope"]),
                [[float(value) for value in changes] for changes in found[kind]["changes"]],
            )
            for kind in (WITH, WITHOUT)
        }
    wanted = [runs.steps] * len(runs.widths)
    every = [slope for kinds in slopes.values() for slope in kinds.values()]
    if not every or any([len(c) for c in slope.changes] != wanted for slope in every):
        raise ValueError("it has not a change for each width and step")
    if min(value for slope in every for changes in slope.changes for value in changes) < 0:
        raise ValueError("a change is below 0")
    if min(changes[-1] for slope in every for changes in slope.changes) == 0:
        raise ValueError("a last change is 0")
    return CoordinateRecord(runs, slopes)


def parse_runs(raw: dict[str, Any]) -> WidthRuns:
    """Raises KeyError, TypeError and ValueError for a damaged record."""
    batch = f"{int(raw['global_batch'])} x {int(raw['seq_len'])} tokens"
    name = f"{raw['row']}, {int(raw['n_layer'])} layers, {raw['recipe']}, {raw['precision']}"
    named = {path.rpartition(".")[2]: float(rate) for path, rate in raw["rates"].items()
             if path.startswith("optimizer.")}  # fmt: skip
    rates = ", ".join(f"{key} {rate:g}" for key, rate in named.items())
    widths = [int(width) for width in raw["widths"]]
    if len(widths) < 2:
        raise ValueError("it has fewer than two widths")
    of_steps = f"{int(raw['steps'])} steps of {batch}"
    title = f"{name}, {of_steps}, {raw['data']}, d_model {', '.join(map(str, widths))}"
    title, hardware = printable(title), printable(str(raw["hardware"]))
    return WidthRuns(
        title, hardware, widths, printable(rates), int(raw["steps"]), int(raw["seeds"])
    )


def coordinate_tables(records: Sequence[CoordinateRecord]) -> str:
    """A table with its notes for each coordinate check."""
    texts = [text for record in records for text in with_notes(coordinate_table(record))]
    return "\n\n".join(texts) if texts else "Not measured."


def coordinate_table(record: CoordinateRecord) -> Table:
    """The slope of each activation, with muP and without."""
    runs = record.runs
    low, high = runs.widths[0], runs.widths[-1]
    rows = []
    for name, kinds in record.slopes.items():
        slopes = [f"{kinds[kind].exponent:+.2f}" for kind in (WITH, WITHOUT)]
        last = [[changes[-1] for changes in kinds[kind].changes] for kind in (WITH, WITHOUT)]
        rows.append(TableRow([name, *slopes, *(f"{c[-1] / c[0]:.2f}" for c in last)], "measured"))
    note = COORDINATE_NOTE.format(
        steps=runs.steps,
        rates=runs.rates,
        seeds=runs.seeds,
        widths=", ".join(map(str, runs.widths)),
        low=low,
        high=high,
    )
    headers = [header.format(low, high) for header in COORDINATE_HEADERS]
    return Table(f"{runs.title} ({runs.hardware})", headers, rows, frozenset({0}), [note])


def coordinate_parts(records: Sequence[CoordinateRecord]) -> list[ReportPart]:
    """A part of the report for each coordinate check."""
    return [
        ReportPart(
            f"coordinate check: {record.runs.title}",
            tables=[coordinate_table(record)],
            pictures=[_plot(record)],
        )
        for record in records
    ]


def _plot(record: CoordinateRecord) -> Picture:
    """A panel for each activation: change over width, a line for each step, the last one dark."""
    runs, columns = record.runs, 4
    rows = math.ceil(len(record.slopes) / columns)
    figure = empty_figure(12, 3 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, kinds) in zip(panels, record.slopes.items(), strict=False):
        for kind, colour, label in ((WITHOUT, COLOURS[1], "without"), (WITH, COLOURS[0], "muP")):
            _draw_steps(axes, runs.widths, kinds[kind], colour, label)
        axes.set_title(name, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(runs.widths, [str(width) for width in runs.widths])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in panels[len(record.slopes) :]:
        axes.set_visible(False)
    figure.supxlabel("d_model")
    figure.supylabel("change since the start, root mean square")
    title = f"{runs.title}, steps 1 (light) to {runs.steps} (dark)"
    figure.suptitle(f"{title}\n{runs.hardware}", fontsize=10)
    words = [
        f"{name} {kinds[WITH].exponent:+.2f} and {kinds[WITHOUT].exponent:+.2f}"
        for name, kinds in record.slopes.items()
    ]
    alt = f"Change of activations over width, {title}: slopes with muP and without: "
    alt += f"{'; '.join(words)}."
    return Picture(picture_name("coordinates", runs.title, runs.hardware), alt, png(figure))


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
