"""The tables and plots of `fgpt bench recipe`: validation loss against tokens and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.errors import printable
from fgpt.report.document import ReportPart
from fgpt.report.plots import COLOURS, Picture, empty_figure, picture_name, png
from fgpt.report.records import Ratio, read_measurements
from fgpt.report.tables import Table, TableRow, with_notes

HEADERS = ("recipe", "validation loss", "time of a step, x", "tokens, x", "seconds, x")
NOTE = (
    "Median of {seeds} seeds (lowest-highest). All recipes train the same model from the same"
    " initial weights on the same samples, in turn in one process. tokens, seconds: of training"
    " steps, to the validation loss with which {baseline} ends, as shares of what that takes."
)
Points = list[tuple[float, float, float]]
"""(tokens, seconds, validation loss) on the way."""


@dataclass(frozen=True)
class RecipeRecord:
    """Recipes that were compared on one machine."""

    title: str
    """For example `tiny, bf16, 600 steps of 4,096 tokens, data/prepared/texts: adamw, muon`."""
    hardware: str
    seeds: int
    baseline: str
    values: dict[str, dict[str, Ratio | None]]
    """Recipe -> name -> median, lowest, highest; None: not every seed gets there."""
    curves: dict[str, list[Points]]
    """Recipe -> the curve of each seed."""


def read_recipe_records(paths: Sequence[Path]) -> list[RecipeRecord]:
    """The last record of each comparison on each machine; other lines are ignored.

    Raises UserError.
    """
    records = read_measurements(paths, "recipe", _record)
    return list({(record.hardware, record.title): record for record in records}.values())


def _record(raw: dict[str, Any]) -> RecipeRecord:
    values: dict[str, dict[str, Ratio | None]] = {}
    for recipe, found in raw["values"].items():
        values[str(recipe)] = {name: _three(found[name]) for name in NAMES}
    curves: dict[str, list[Points]] = {}
    for line in raw["curves"]:
        points = [(float(t), float(s), float(loss)) for t, s, loss in line["points"]]
        curves.setdefault(str(line["recipe"]), []).append(points)
    steps, tokens = int(raw["steps"]), int(raw["tokens"])
    title = f"{raw['row']}, {raw['precision']}, {steps} steps of {tokens // max(1, steps):,} tokens"
    return RecipeRecord(
        printable(f"{title}, {raw['data']}: {', '.join(values)}"),
        printable(str(raw["hardware"])),
        int(raw["seeds"]),
        str(raw["baseline"]),
        values,
        curves,
    )


NAMES = ("loss", "step_time", "tokens", "seconds")
"""Of the values, in the order of HEADERS."""


def _three(values: Any) -> Ratio | None:
    if values is None:
        return None
    median, low, high = map(float, values)
    return median, low, high


def recipe_tables(records: Sequence[RecipeRecord]) -> str:
    """A table with its notes for each comparison."""
    texts = [text for record in records for text in with_notes(_table(record))]
    return "\n\n".join(texts) if texts else "Not measured."


def _table(record: RecipeRecord) -> Table:
    rows = [
        TableRow([recipe, *(_cell(name, found[name]) for name in NAMES)], "measured")
        for recipe, found in record.values.items()
    ]
    note = NOTE.format(seeds=record.seeds, baseline=record.baseline)
    return Table(f"{record.title} ({record.hardware})", HEADERS, rows, frozenset({0}), [note])


def _cell(name: str, three: Ratio | None) -> str:
    if three is None:
        return "never"
    digits = 3 if name == "loss" else 2
    median, low, high = (f"{value:.{digits}f}" for value in three)
    return median if low == high else f"{median} ({low}-{high})"


def recipe_parts(records: Sequence[RecipeRecord]) -> list[ReportPart]:
    """A part of the report for each comparison."""
    return [
        ReportPart(f"recipe: {record.title}", tables=[_table(record)], pictures=[_plot(record)])
        for record in records
    ]


def _plot(record: RecipeRecord) -> Picture:
    """Validation loss over tokens and over seconds, a line for each seed."""
    figure = empty_figure(11, 4.8)
    for axes, place, label in zip(
        figure.subplots(1, 2, sharey=True),
        (0, 1),
        ("training tokens, millions", "seconds of training steps"),
        strict=True,
    ):
        for i, (recipe, curves) in enumerate(record.curves.items()):
            for n, points in enumerate(curves):
                xs = [p[place] / (1e6 if place == 0 else 1) for p in points]
                label_once = recipe if n == 0 else None
                colour = COLOURS[i % len(COLOURS)]
                axes.plot(xs, [p[2] for p in points], color=colour, label=label_once, alpha=0.8)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 0:
            axes.set_ylabel("validation loss, nats per token")
            # the first tenth of a curve would flatten the rest
            losses = [p[2] for curves in record.curves.values() for c in curves for p in c]
            late = [c[len(c) // 8][2] for curves in record.curves.values() for c in curves]
            axes.set_ylim(min(losses) - 0.1, max(late) + 0.1)
            axes.legend(frameon=False)
    figure.suptitle(f"{record.title}\n{record.hardware}", fontsize=10)
    ends = [f"{name} {found['loss'][0]:.3f}" for name, found in record.values.items()
            if found["loss"] is not None]  # fmt: skip
    alt = f"Validation loss of recipes over tokens and seconds, {record.title}: {', '.join(ends)}."
    return Picture(picture_name("recipe", record.title, record.hardware), alt, png(figure))
