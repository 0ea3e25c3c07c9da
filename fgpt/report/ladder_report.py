"""The table and plot of `fgpt bench recipe --ladder`: losses, their law, the size left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.errors import printable
from fgpt.report.document import ReportPart
from fgpt.report.plots import COLOURS, GREY, MARKERS, Picture, empty_figure, picture_name, png
from fgpt.report.records import read_measurements
from fgpt.report.tables import Table, TableRow, with_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADERS = ("layers x width", "N", "D", "FLOPs", "validation loss", "law", "error")
CONSTANTS = ("E", "A", "a", "B", "b")
CURVE_POINTS = 60
LAW = (
    "loss = E + A / N^a + B / D^b, fitted to all runs but those of the largest size: {constants}."
    " In brackets: the lowest and highest of the laws of all these runs but one, which is no"
    " confidence interval. N: weights of blocks and head; D: training tokens; every run is a whole"
    " one with its own schedule, from one seed."
)
LEFT_OUT = (
    "Left out, {size} with {tokens:.2f}M tokens: predicted {predicted:.3f} ({lowest:.3f} to"
    " {highest:.3f}), measured {loss:.3f}: {difference:+.3f} nats, {error:+.1%}{others}. The next"
    " smaller size has {smaller:.3f} at the same compute; taking that as the prediction:"
    " {naive:+.1%}."
)


@dataclass(frozen=True)
class RecordedRun:
    """A finished run."""

    size: str
    """Layers x width."""
    parameters: float
    tokens: float
    flops: float
    loss: float
    predicted: float
    """By the law."""
    span: tuple[float, float] | None
    """The lowest and highest prediction by the laws of all runs but one; None: the law was fitted
    to this run."""


@dataclass(frozen=True)
class LadderRecord:
    """A ladder of one recipe on one machine."""

    title: str
    """For example `tiny, muon, bf16, 16 x 256 tokens a step, data/prepared/texts`."""
    hardware: str
    constants: dict[str, float]
    spread: dict[str, tuple[float, float]]
    fitted: list[RecordedRun]
    left_out: list[RecordedRun]
    """By tokens."""
    diverged: list[str]

    def law(self, parameters: float, tokens: float) -> float:
        """The loss that it predicts."""
        e, factor_a, a, factor_b, b = (self.constants[name] for name in CONSTANTS)
        return e + factor_a / parameters**a + factor_b / tokens**b


def read_ladder_records(paths: Sequence[Path]) -> list[LadderRecord]:
    """The last record of each ladder on each machine; other lines are ignored. Raises UserError."""
    records = read_measurements(paths, "ladder", parse_ladder)
    return list({(record.hardware, record.title): record for record in records}.values())


def parse_ladder(raw: dict[str, Any]) -> LadderRecord:
    """A line of a records file. Raises KeyError, TypeError and ValueError for a damaged one."""
    batch = f"{int(raw['global_batch'])} x {int(raw['seq_len'])} tokens a step"
    layers = int(raw["left_out"][0]["n_layer"]) if raw["left_out"] else 0
    name = f"{raw['row']}, {layers} layers, {raw['recipe']}, {raw['precision']}"
    title = f"{name}, {batch}, {raw['data']}"
    spread = {name: (float(low), float(high)) for name, (low, high) in raw["spread"].items()}
    record = LadderRecord(
        printable(title),
        printable(str(raw["hardware"])),
        {name: float(raw["constants"][name]) for name in CONSTANTS},
        {name: spread[name] for name in CONSTANTS},
        [_point(each, False) for each in raw["points"]],
        [_point(each, True) for each in raw["left_out"]],
        [printable(str(name)) for name in raw["diverged"]],
    )
    if not record.fitted or not record.left_out:
        raise ValueError("it has no points")
    return record


def _point(raw: dict[str, Any], left_out: bool) -> RecordedRun:
    numbers = [float(raw[name]) for name in ("parameters", "tokens", "flops", "loss", "predicted")]
    if min(numbers) <= 0:
        raise ValueError("a point has a number that is not above 0")
    span = (float(raw["lowest"]), float(raw["highest"])) if left_out else None
    size = f"{int(raw['n_layer'])} x {int(raw['d_model'])}"
    parameters, tokens, flops, loss, predicted = numbers
    return RecordedRun(size, parameters, tokens, flops, loss, predicted, span)


def ladder_tables(records: Sequence[LadderRecord]) -> str:
    """A table with its notes for each ladder."""
    texts = [text for record in records for text in with_notes(ladder_table(record))]
    return "\n\n".join(texts) if texts else "Not measured."


def ladder_table(record: LadderRecord) -> Table:
    """The runs, measured and by the law; the notes have the constants and the left-out error."""
    rows = [_row(point) for point in (*record.fitted, *record.left_out)]
    constants = [
        f"{name} {record.constants[name]:.3g} ({low:.3g} to {high:.3g})"
        for name, (low, high) in record.spread.items()
    ]
    notes = [LAW.format(constants=", ".join(constants)), _left_out(record)]
    if record.diverged:
        notes.append(f"Diverged and left out of the law: {'; '.join(record.diverged)}.")
    title = f"{record.title} ({record.hardware})"
    return Table(title, HEADERS, rows, frozenset({0}), notes)


def _row(point: RecordedRun) -> TableRow:
    cells = [
        point.size if point.span is None else f"{point.size}, left out",
        f"{point.parameters / 1e6:.2f}M",
        f"{point.tokens / 1e6:.2f}M",
        f"{point.flops:.2g}",
        f"{point.loss:.3f}",
        f"{point.predicted:.3f}",
        f"{point.predicted / point.loss - 1:+.1%}",
    ]
    return TableRow(cells, "measured")


def _left_out(record: LadderRecord) -> str:
    """The prediction of the longest run that was left out, and what it is worth."""
    last = record.left_out[-1]
    below = max(point.parameters for point in record.fitted)
    others = [point for point in record.fitted if point.parameters == below]
    assert last.span is not None
    errors = [f"{point.predicted / point.loss - 1:+.1%}" for point in record.left_out[:-1]]
    shorter = f" (its shorter runs: {', '.join(errors)})" if errors else ""
    smaller = min(others, key=lambda point: abs(point.flops - last.flops)).loss
    return LEFT_OUT.format(
        size=last.size,
        tokens=last.tokens / 1e6,
        predicted=last.predicted,
        lowest=last.span[0],
        highest=last.span[1],
        loss=last.loss,
        difference=last.predicted - last.loss,
        error=last.predicted / last.loss - 1,
        others=shorter,
        smaller=smaller,
        naive=smaller / last.loss - 1,
    )


def ladder_parts(records: Sequence[LadderRecord]) -> list[ReportPart]:
    """A part of the report for each ladder."""
    return [
        ReportPart(
            f"ladder: {record.title}", tables=[ladder_table(record)], pictures=[_plot(record)]
        )
        for record in records
    ]


def _plot(record: LadderRecord) -> Picture:
    """Loss over tokens and over FLOPs: measured points, and the law's curve of each size."""
    from matplotlib.ticker import LogLocator

    figure = empty_figure(11, 4.8)
    points = [*record.fitted, *record.left_out]
    sizes = list(dict.fromkeys(point.size for point in points))
    for axes, over_flops in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for i, size in enumerate(sizes):
            own = [point for point in points if point.size == size]
            _draw_size(axes, record, own, i, over_flops)
        axes.set_xscale("log", subs=())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("training FLOPs" if over_flops else "training tokens, millions")
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        if not over_flops:
            axes.set_ylabel("validation loss, nats per token")
            axes.legend(frameon=False, title="layers x width, N")
    figure.suptitle(f"{record.title}\n{record.hardware}", fontsize=10)
    alt = (
        f"Validation loss of {len(sizes)} sizes over tokens and FLOPs with the fitted law,"
        f" {record.title}. {_left_out(record)}"
    )
    return Picture(picture_name("ladder", record.title, record.hardware), alt, png(figure))


def _draw_size(
    axes: Axes, record: LadderRecord, points: list[RecordedRun], number: int, over_flops: bool
) -> None:
    """A size: its runs, and its curve; dashed, with the laws' range, if it was left out."""
    colour, first = COLOURS[number % len(COLOURS)], points[0]
    left_out = first.span is not None
    per_token = first.flops / first.tokens if over_flops else 1e6
    scale = per_token if over_flops else 1 / per_token
    low, high = (f(point.tokens for point in points) for f in (min, max))
    tokens = [
        low / 1.2 * (1.44 * high / low) ** (i / CURVE_POINTS) for i in range(CURVE_POINTS + 1)
    ]
    label = f"{first.size}, {first.parameters / 1e6:.2f}M" + (", left out" if left_out else "")
    axes.plot(
        [n * scale for n in tokens],
        [record.law(first.parameters, n) for n in tokens],
        "--" if left_out else "-",
        color=colour,
        linewidth=1.5,
    )
    axes.plot(
        [point.tokens * scale for point in points],
        [point.loss for point in points],
        MARKERS[number % len(MARKERS)],
        color=colour,
        markerfacecolor="white" if left_out else colour,
        label=label,
    )
    for point in points:
        if point.span is not None:
            axes.plot([point.tokens * scale] * 2, point.span, color=GREY, linewidth=4, alpha=0.4)
