"""The published tables counted right, and what two cards were to one there and are here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fgpt.report.cells import number, percent
from fgpt.report.full import efficiency
from fgpt.report.published import MULTI, ROUND, ROUNDS, SINGLE, Published, speed_of_two
from fgpt.report.records import Record
from fgpt.report.tables import Row, Table

TITLE = "The published tables, as printed and as samples over the time they took"


def published_table(*, times: bool) -> Table:
    """Both published tables; `times`: with their columns of milliseconds."""
    headers = [
        "cards",
        "Parameters (B)",
        "train ms",
        "train SPS, printed",
        "train SPS",
        "predict ms",
        "predict SPS, printed",
        "predict SPS",
        "GB a card",
    ]
    keep = [i for i, header in enumerate(headers) if times or not header.endswith(" ms")]
    lines = [_cells(line) for line in (*SINGLE, *MULTI)]
    return Table(
        TITLE,
        [headers[i] for i in keep],
        [Row([line[i] for i in keep]) for line in lines],
        text_columns=frozenset(),
        notes=[explanation()],
    )


def _cells(line: Published) -> list[str]:
    return [
        str(line.cards),
        f"{line.billions:.3f}",
        str(line.train_ms),
        str(line.train_sps),
        number(line.train_samples_per_s),
        str(line.predict_ms),
        str(line.predict_sps),
        number(line.predict_samples_per_s),
        f"{line.memory_gb:.3f}",
    ]


def explanation() -> str:
    """Why two cards are printed as slower than one, with the figures."""
    train, predict = speed_of_two()
    pairs = list(zip(SINGLE, MULTI, strict=True))
    thirds = [two.predict_ms / ROUNDS / one.predict_ms for one, two in pairs]
    one, two = pairs[-1]
    return (
        f"As printed, two cards are slower than one: {two.train_sps:.1f} samples/s against"
        f" {one.train_sps:.1f} at {one.billions:.3f} B. That is how they were counted. Each line is"
        f" of {ROUNDS} rounds of {ROUND} samples. One card's training column divides"
        f" {ROUND * ROUNDS} samples by the time of one round; two cards' columns divide the"
        f" {ROUND // 2} samples that one of them had in a round by the time of all {ROUNDS} (a"
        f" third of their prediction times is {_range(thirds)} of one card's, as it must be for"
        f" half of the samples). As samples over the time they took, two cards trained"
        f" {_range(train)} times as fast as one and predicted {_range(predict)} times as fast."
        f" Memory was not shared out: {two.memory_gb:.1f} GB a card against {one.memory_gb:.1f}."
    )


def scaling_here(records: Iterable[Record]) -> list[str]:
    """What more ranks did on each measured machine, or that nobody measured it."""
    everything = list(records)
    scaled = [
        record
        for record in everything
        if record.section in ("strong", "weak") and record.figures and record.figures.train_ratio
    ]
    machines = dict.fromkeys(record.hardware for record in scaled)
    lines = [
        _machine([record for record in scaled if record.hardware == machine], everything)
        for machine in machines
    ]
    if not any(record.on_gpu for record in scaled):
        lines.append("Scaling over GPUs: not measured.")
    return lines


def _machine(scaled: Sequence[Record], records: Sequence[Record]) -> str:
    ideal = (
        "N GPUs should do N times as much"
        if scaled[0].on_gpu
        else "ranks that share the cores have no more of them than one process with all of them"
    )
    parts = []
    for section, what in (("strong", "the same batch"), ("weak", "a batch that grows")):
        for row in dict.fromkeys(record.row for record in scaled):
            chosen = [r for r in scaled if (r.section, r.row) == (section, row)]
            texts = "; ".join(_of_one(record, records) for record in chosen)
            parts += [f"{row} with {what}: {texts}."] if texts else []
    head = f"{scaled[0].hardware}, training samples/s, times 1 rank ({ideal})."
    return " ".join([head, *parts])


def _of_one(record: Record, records: Sequence[Record]) -> str:
    """As in `4 ranks 3.60 (efficiency 90.0%, 8.0% communicating)`."""
    figures = record.figures
    assert figures and figures.train_ratio
    noun = "rank" if figures.ranks == 1 else "ranks"
    remarks = []
    if record.on_gpu:
        remarks.append(f"efficiency {percent(efficiency(record, records))}")
    if figures.shares and figures.ranks > 1:
        remarks.append(f"{percent(figures.shares.get('communication'))} communicating")
    text = f"{figures.ranks} {noun} {figures.train_ratio[0]:.2f}"
    return f"{text} ({', '.join(remarks)})" if remarks else text


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"
