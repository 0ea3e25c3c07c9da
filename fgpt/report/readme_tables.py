"""The short tables of a README, written between its markers `<!-- bench:NAME -->`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from fgpt.errors import UserError
from fgpt.report import tables
from fgpt.report.records import Record
from fgpt.report.report_tables import TITLES, efficiency_column, scaling_sentences, state_notes
from fgpt.report.tables import Column, identity_columns, make_table, measured, with_references
from fgpt.utils.files import write_atomic

SPEED = (
    measured("train SPS", lambda m: tables.number(m.train.samples_per_s)),
    measured("predict SPS", tables.prediction_sps),
    measured("GB", lambda m: tables.gigabytes(m.memory_bytes)),
)
RELATIVE = (
    *SPEED,
    measured("x train", lambda m: tables.ratio(m.train_ratio)),
    measured("x predict", lambda m: tables.ratio(m.predict_ratio)),
    measured("x memory", lambda m: tables.percent(m.memory_ratio)),
)


def _single(section: str) -> Callable[[Sequence[Record]], str]:
    return lambda records: _section_text(records, "single", section, RELATIVE)


def _best(records: Sequence[Record]) -> str:
    """An item for every machine: the fastest variant of each model, and the peer."""
    single = [record for record in records if record.bench == "single" and record.measurement]
    items = []
    for hardware, group in groupby(single, key=lambda record: record.hardware):
        members = [record for record in group if record.state == "measured"]
        loops, peers = ", ".join(_fastest_texts(members)), ", ".join(_peer_texts(members))
        parts = [f"against a plain loop in fp32, {loops}"] * bool(loops)
        model = next((r.workload for r in members if r.section == "compare"), "")
        parts += [f"against transformers ({model}), {peers}"] * bool(peers)
        if parts:
            items.append(_wrapped(f"- {hardware}: {'; '.join(parts)}.", "  "))
    title = "How many times as fast FGPT trains; median of the rounds (lowest-highest):"
    texts = [title, "\n".join(items)] if items else ["Not measured."]
    if items and not any(record.on_gpu for record in single):
        texts.append("GPU: not measured.")
    return "\n\n".join(texts)


def _fastest_texts(members: Sequence[Record]) -> Iterator[str]:
    """Each model's fastest variant against the plain loop."""
    ladder = [r for r in members if r.section == "ladder" and r.env_name != r.reference]
    for model, variants in groupby(ladder, key=lambda record: record.workload):
        best = max(variants, key=_train_sps)
        ratio = tables.ratio(best.measurement.train_ratio if best.measurement else None)
        yield f"{model} {ratio} with {best.env_name}"


def _peer_texts(members: Sequence[Record]) -> Iterator[str]:
    """FGPT against transformers, round by round, where one run measured both."""
    by_name = {record.env_name: record for record in members if record.section == "compare"}
    pairs = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "bf16 weights"))
    for ours, theirs in pairs:
        fgpt, peer = by_name.get(f"FGPT, {ours}"), by_name.get(f"transformers, {theirs}")
        if fgpt is None or peer is None or not _are_one_run(fgpt, peer):
            continue
        assert fgpt.measurement and peer.measurement  # `_best` passes no others
        ratio = fgpt.measurement.train.relative_to(peer.measurement.train)
        yield f"{tables.ratio(ratio)} in {theirs}"


def _are_one_run(one: Record, other: Record) -> bool:
    keys = ("time_utc", "command")
    return all(one.environment.get(k) == other.environment.get(k) for k in keys)


def _train_sps(record: Record) -> float:
    return record.measurement.train.samples_per_s if record.measurement else 0.0


def _layouts(records: Sequence[Record]) -> str:
    sent = measured("MB sent per step", tables.sent, is_text=True)
    return _section_text(records, "multi", "layouts", [*_multi_columns(records), sent])


def _scaling(records: Sequence[Record]) -> str:
    columns = _multi_columns(records)
    strong = _section_text(records, "multi", "strong", columns, gpu_note=False)
    weak = _section_text(records, "multi", "weak", columns, gpu_note=False)
    sentences = map(_wrapped, scaling_sentences(records))
    return "\n\n".join(text for text in (strong, weak, *sentences) if text)


GENERATORS: Mapping[str, Callable[[Sequence[Record]], str]] = {
    "single": _single("ladder"),
    "best": _best,
    "memory": _single("memory"),
    "compare": _single("compare"),
    "multi": _layouts,
    "scaling": _scaling,
}
"""NAME of a marker -> the function that generates its text."""
OTHERS = ("checkpoint", "recipe", "ladder")
"""NAMEs of the tables of other benchmarks, which other modules generate from their own records."""
NAMES = (*GENERATORS, *OTHERS)


def _multi_columns(records: Sequence[Record]) -> list[Column]:
    return [
        measured("ranks", lambda m: str(m.ranks)),
        *SPEED,
        measured("x 1 rank", lambda m: tables.ratio(m.train_ratio)),
        efficiency_column(records),
    ]


def _section_text(
    records: Sequence[Record],
    bench: str,
    section: str,
    columns: Sequence[Column],
    title: str | None = None,
    gpu_note: bool = True,
) -> str:
    """A table with its notes for each machine that measured one of the section's scenarios."""
    title = title or TITLES[section]
    chosen = [record for record in records if (record.bench, record.section) == (bench, section)]
    texts = []
    for hardware, members in groupby(chosen, key=lambda record: record.hardware):
        group = list(members)
        if not any(record.measurement for record in group):
            continue
        shown = with_references(group, records)
        rows = [record for record in shown if record.measurement]
        headers = [*identity_columns(records, "Parameters (B)"), *columns]
        notes = [_units(rows, group), *state_notes(shown)]
        table = make_table(title, rows, headers).markdown()
        texts += [f"{title} ({hardware}):", table, *map(_wrapped, notes)]
    if gpu_note and not any(record.on_gpu and record.measurement for record in chosen):
        texts.append("GPU: not measured." if texts else "Not measured.")
    return "\n\n".join(texts)


def _units(rows: Sequence[Record], group: Sequence[Record]) -> str:
    references = ", ".join(dict.fromkeys(record.reference for record in group))
    tokens: dict[int, dict[str, None]] = {}
    memory: dict[str, None] = {}
    for record in rows:
        if record.measurement:
            tokens.setdefault(record.measurement.seq_len, {})[record.workload] = None
            memory[record.measurement.memory_kind] = None
    samples = "; ".join(f"{n} tokens ({', '.join(models)})" for n, models in tokens.items())
    return (
        f"SPS: samples per second, median over the rounds; a sample has {samples}. GB: 2^30 bytes,"
        f" {', '.join(memory)}. x: relative to {references}, median of the rounds' ratios"
        " (lowest-highest)."
    )


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, tables.WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


MARKER = re.compile(r"^<!-- (/?)bench:(\S*) -->[ \t]*\r?$", re.MULTILINE)


class MarkedBlock(NamedTuple):
    """The text between a pair of markers, as offsets into the file."""

    name: str
    start: int
    end: int


class FilledReadme(NamedTuple):
    """A README before and after its tables are generated."""

    path: Path
    text: str
    """With generated tables."""
    names: Sequence[str]
    """Of the tables in it."""
    changed: Sequence[str]
    """Names of those that differ from the file."""

    def write(self) -> None:
        """Replace the file if a table differs. Raises UserError."""
        if not self.changed:
            return
        try:
            write_atomic(self.path, self.text.encode())
        except OSError as error:
            raise UserError(f"--readme {self.path}: {error.strerror}: cannot be written") from error


def fill_readme(
    path: Path, records: Sequence[Record], others: Mapping[str, str] | None = None
) -> FilledReadme:
    """Generate the tables of a README, without writing it; `others`: text of each of OTHERS.

    Raises UserError.
    """
    others = others or {}
    try:
        before = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not text"
        raise UserError(f"--readme {path}: {why}: name a Markdown file") from error
    blocks = _find_blocks(path, before)
    line_end = "\r\n" if "\r\n" in before else "\n"
    after, done, changed = "", 0, []
    for block in blocks:
        if block.name in OTHERS:
            made = others.get(block.name, "Not measured.")
        else:
            made = GENERATORS[block.name](records)
        text = f"\n{made}\n\n".replace("\n", line_end)
        if before[block.start : block.end] != text:
            changed.append(block.name)
        after += before[done : block.start] + text
        done = block.end
    names = [block.name for block in blocks]
    return FilledReadme(path, after + before[done:], names, changed)


def _find_blocks(path: Path, text: str) -> list[MarkedBlock]:
    """The pairs of markers in order, each marker alone on its line. Raises UserError."""
    blocks: list[MarkedBlock] = []
    opened: re.Match[str] | None = None
    for marker in MARKER.finditer(text):
        is_end, name = marker[1] == "/", marker[2]
        place = _place(path, text, marker)
        if name not in NAMES:
            raise UserError(f"{place}: no such table: known are {', '.join(NAMES)}")
        if not is_end:
            if opened is not None or any(block.name == name for block in blocks):
                why = "is repeated" if opened is None else f"is inside of bench:{opened[2]}"
                raise UserError(f"{place}: {why}: each table needs one pair of markers")
            opened = marker
            continue
        if opened is None or opened[2] != name:
            raise UserError(f"{place}: is not opened: put <!-- bench:{name} --> before it")
        start = text.index("\n", opened.start()) + 1
        blocks.append(MarkedBlock(name, start, marker.start()))
        opened = None
    if opened is not None:
        raise UserError(
            f"{_place(path, text, opened)}: is not closed: put <!-- /bench:{opened[2]} --> after it"
        )
    if not blocks:
        raise UserError(
            f"--readme {path}: has no marker: put <!-- bench:NAME --> and <!-- /bench:NAME -->"
            f" on lines of their own where a table is to be; NAME: {', '.join(NAMES)}"
        )
    return blocks


def _place(path: Path, text: str, marker: re.Match[str]) -> str:
    line = text.count("\n", 0, marker.start()) + 1
    return f"--readme {path}:{line}: {marker[0].strip()}"
