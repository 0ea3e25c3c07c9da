"""The report's plots as PNGs in memory: speed over variants and ranks, bars for each workload."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fgpt.report.records import Record
from fgpt.report.tables import GIB, display_name, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# distinguishable with red-green blindness; alternately darker and lighter
COLOURS = ("#2f5f98", "#e08a2e", "#3f8f6b", "#c79bd6", "#7a3b69", "#6fb1c9", "#5f5f5f", "#b59a2a")
MARKERS = "os^Dv<>P"
WRONG = "#c8452d"
GREY = "#888888"
BAR_INCHES = 0.32

Point = tuple[float, float]


class Picture(NamedTuple):
    """A PNG with its file name and its description in words."""

    name: str
    alt: str
    png: bytes


def slug(text: str) -> str:
    """A text as part of a file name: `AMD EPYC, 2 cores` -> `amd-epyc-2-cores`."""
    letters = (letter if letter.isascii() and letter.isalnum() else " " for letter in text.lower())
    return "-".join("".join(letters).split())


def picture_name(kind: str, title: str, hardware: str) -> str:
    """A file name for a title of any length: cut, with a hash of what was cut."""
    digest = hashlib.sha256(f"{title} {hardware}".encode()).hexdigest()[:8]
    return f"{kind}-{slug(title)[:60]}-{digest}.png"


def ladder_plot(records: Sequence[Record]) -> Picture | None:
    """Training speed relative to the reference over the ladder's variants; None without any.

    `records`: of the single benchmark on one machine.
    """
    ladder = [record for record in records if record.section == "ladder"]
    if not any(record.train_ratio for record in ladder):
        return None
    variants = dict.fromkeys(r.env_name for r in sorted(ladder, key=lambda r: r.order[1]))
    place = {variant: float(i) for i, variant in enumerate(variants)}
    lines: dict[str, list[Point]] = {}
    wrong: list[Point] = []
    for record in ladder:
        if record.train_ratio:
            line = wrong if record.state == "wrong" else lines.setdefault(record.workload, [])
            line.append((place[record.env_name], record.train_ratio))
    figure = empty_figure(10, 5.2)
    axes = figure.add_subplot()
    _draw_lines(axes, lines)
    if wrong:
        axes.plot(*_columns(wrong), "x", color=WRONG, markersize=10, label="WRONG losses")
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_xticks(range(len(place)), list(place), rotation=35, ha="right")
    axes.set_xlim(-0.3, len(place) - 0.7)
    reference, hardware = ladder[0].reference, ladder[0].hardware
    title = f"single: speed relative to {reference}, variant by variant, {hardware}"
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("variant: each adds one optimization to the one before")
    _finish_lines(axes, f"training speed relative to {reference}")
    best = [f"{model} up to {max(y for _, y in line):.2f}" for model, line in lines.items()]
    alt = f"{title}: lines of training speed. {'; '.join(best)}."
    return Picture(f"{slug(f'single times {hardware}')}.png", alt, png(figure))


def scaling_plot(records: Sequence[Record]) -> Picture | None:
    """Strong and weak scaling over ranks against the ideal; None if nothing was scaled.

    `records`: of the multi benchmark on one machine.
    """
    scaled = [r for r in records if r.section in ("strong", "weak") and r.train_ratio]
    if not scaled:
        return None
    hardware, on_gpu = scaled[0].hardware, scaled[0].on_gpu
    figure = empty_figure(11, 4.8)
    words = []
    for axes, section in zip(figure.subplots(1, 2, sharey=True), ("strong", "weak"), strict=True):
        lines = _lines_over_ranks([record for record in scaled if record.section == section])
        ticks = sorted({1.0} | {x for line in lines.values() for x, _ in line})
        text = "N times one" if on_gpu else "one process that uses all cores"
        ideal = ticks if on_gpu else [1.0] * len(ticks)
        axes.plot(ticks, ideal, "--", color=GREY, label=f"ideal: {text}")
        _draw_lines(axes, lines)
        for model, line in lines.items():
            words += [f"{section}, {model}, {x:.0f} ranks: {y:.2f}" for x, y in line if x > 1]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
        axes.set_xlabel("ranks")
        axes.set_title(f"{section} scaling")
        if on_gpu:  # the ideal is a straight line
            axes.set_yscale("log", base=2)
            axes.set_yticks(ticks, [f"{x:.0f}" for x in ticks])
        else:
            axes.set_ylim(0, 1.15 * max(1.0, *(record.train_ratio for record in scaled)))
        axes.minorticks_off()
        _finish_lines(axes, "training speed relative to 1 rank" if section == "strong" else "")
    title = f"multi: {hardware}"
    figure.suptitle(title)
    alt = f"{title}: training speed relative to 1 rank. {'; '.join(words)}."
    return Picture(f"{slug(f'multi scaling {hardware}')}.png", alt, png(figure))


def _lines_over_ranks(records: Sequence[Record]) -> dict[str, list[Point]]:
    """Workload -> (ranks, relative speed); strong scaling begins at the reference itself."""
    lines: dict[str, list[Point]] = {}
    for record in records:
        if record.measurement and record.state == "measured":
            start = [(1.0, 1.0)] if record.section == "strong" else []
            line = lines.setdefault(record.workload, start)
            line.append((float(record.measurement.ranks), record.train_ratio))
    return {model: sorted(line) for model, line in lines.items()}


def bar_chart(records: Sequence[Record]) -> Picture:
    """Training samples/s and peak memory of every variant, from top to bottom.

    `records`: of one workload on one machine; those not measured show their state.
    """
    first = records[0]
    figure = empty_figure(11, 1.7 + BAR_INCHES * len(records))
    speed, memory = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(dict.fromkeys(r.section for r in records), COLOURS, strict=False))
    for place, record in enumerate(records):
        if record.measurement is None:
            for axes in (speed, memory):
                axes.text(0, place, f" {record.state}", va="center", color=WRONG, fontsize=9)
            continue
        colour = WRONG if record.state == "wrong" else colours[record.section]
        train = record.measurement.train
        spread = train.samples / max(train.round_s), train.samples / min(train.round_s)
        _draw_bar(speed, place, train.samples_per_s, colour, spread)
        _draw_bar(memory, place, record.measurement.memory_bytes / GIB, colour)
    speed.set_yticks(range(len(records)), [display_name(record) for record in records])
    speed.set_ylim(len(records) - 0.4, -0.6)  # the first on top
    _finish_bars(speed, "training, samples/s (thin line: slowest to fastest round)")
    of_rank = " of one rank" if first.bench == "multi" else ""
    _finish_bars(memory, f"peak memory{of_rank}, GB (2^30 bytes)")
    if len(colours) > 1:
        from matplotlib.patches import Patch

        handles = [Patch(color=colour, label=section) for section, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    title = f"{first.bench}: {first.workload}, {first.hardware}"
    figure.suptitle(title)
    alt = f"{title}: bars of training samples/s and peak memory. {_in_words(records)}"
    name = f"{slug(f'{first.bench} {first.workload} {first.hardware}')}.png"
    return Picture(name, alt, png(figure))


def _draw_bar(
    axes: Axes, place: int, value: float, colour: str, spread: Point | None = None
) -> None:
    axes.barh(place, value, color=colour, height=0.7)
    low, high = spread or (value, value)
    if spread:
        axes.plot([low, high], [place, place], color="#111111", linewidth=1.2)
    axes.annotate(
        number(value),
        (max(high, value), place),
        textcoords="offset points",
        xytext=(4, 0),
        va="center",
        fontsize=9,
    )


def _finish_bars(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.margins(x=0.18)  # for the values beside the bars
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _in_words(records: Sequence[Record]) -> str:
    measured = [(record, record.measurement) for record in records if record.measurement]
    if not measured:
        return "Nothing was measured."
    fastest, speed = max(measured, key=lambda pair: pair[1].train.samples_per_s)
    smallest, memory = min(measured, key=lambda pair: pair[1].memory_bytes)
    return (
        f"Fastest: {display_name(fastest)}, {number(speed.train.samples_per_s)} samples/s. Least"
        f" memory: {display_name(smallest)}, {number(memory.memory_bytes / GIB)} GB."
    )


def empty_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, without any window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_lines(axes: Axes, lines: dict[str, list[Point]]) -> None:
    """Lines that differ in colour and in marker."""
    for i, (model, line) in enumerate(lines.items()):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        axes.plot(*_columns(line), label=model, linewidth=2, markersize=6, **style)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finish_lines(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
