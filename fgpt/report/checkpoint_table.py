"""The tables of `fgpt bench checkpoint`: saving and loading, beside DeepSpeed's."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.errors import printable
from fgpt.report.records import Ratio, read_measurements
from fgpt.report.tables import NONE, WIDTH, Table, TableRow

HEADERS = ("", "FGPT", "DeepSpeed", "x", "DeepSpeed, fsync", "x fsync")
LINES = (
    ("on disk, GB", "bytes", "deepspeed_bytes", "bytes / deepspeed", None, None),
    ("save, s", "save_s", "deepspeed_save_s", "save / deepspeed",
     "deepspeed_durable_s", "save / deepspeed durable"),
    ("stall, s", "stall_s", "deepspeed_save_s", "stall / deepspeed",
     "deepspeed_durable_s", "stall / deepspeed durable"),
    ("lost, s", "lost_s", "deepspeed_save_s", "lost / deepspeed",
     "deepspeed_durable_s", "lost / deepspeed durable"),
    ("verify, load, s", "load_s", "deepspeed_load_s", "load / deepspeed", None, None),
)  # fmt: skip
"""Label, and the names of the values in each column."""
NOTE = (
    "Median of {rounds} rounds (lowest-highest); x: the rounds' ratios to DeepSpeed. GB: 10^9"
    " bytes. save: training waits. stall: training waits for the copy and the commit of a"
    " background save. lost: the stall, and what the steps meanwhile take longer; a step is"
    " {during} times as long while a file is hashed and written. DeepSpeed verifies nothing when"
    " it loads (verification alone: {verify} s); fsync: its files synced, as FGPT's are."
)


@dataclass(frozen=True)
class SaveRecord:
    """One engine's checkpoints on one machine."""

    engine: str
    """For example `gpt2, bf16 ZeRO-2, 2 ranks`."""
    hardware: str
    rounds: int
    values: dict[str, Ratio]
    """Name -> median, lowest and highest."""


def read_save_records(paths: Sequence[Path]) -> list[SaveRecord]:
    """The last record of each engine on each machine; other lines are ignored. Raises UserError."""
    records = read_measurements(paths, "checkpoint", _record)
    return list({(record.hardware, record.engine): record for record in records}.values())


def _record(raw: dict[str, Any]) -> SaveRecord:
    values = {}
    for name, three in raw["values"].items():
        median, low, high = map(float, three)
        values[str(name)] = median, low, high
    needed = {name for _, *names in LINES for name in names if name is not None}
    for name in sorted(needed | {"verify_s", "step during / step"}):
        values[name]  # KeyError
    engine = f"{raw['row']}, {raw['precision']} ZeRO-{raw['zero']}, {raw['ranks']} ranks"
    hardware = printable(str(raw["hardware"]))
    return SaveRecord(printable(engine), hardware, int(raw["rounds"]), values)


def save_tables(records: Sequence[SaveRecord]) -> str:
    """A table with its notes for each engine on each machine."""
    texts = [text for record in records for text in _texts(record)]
    return "\n\n".join([*texts, "GPU: not measured." if texts else "Not measured."])


def _texts(record: SaveRecord) -> Iterator[str]:
    values = record.values
    rows = [
        TableRow([label, *(_cell(label, values, name) for name in names)], "measured")
        for label, *names in LINES
    ]
    title = f"{record.engine} ({record.hardware}):"
    yield title
    yield Table(title, HEADERS, rows, frozenset({0})).markdown()
    during = "{:.2f} ({:.2f}-{:.2f})".format(*values["step during / step"])
    verify = f"{values['verify_s'][0]:.2f}"
    yield textwrap.fill(
        NOTE.format(rounds=record.rounds, during=during, verify=verify),
        WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _cell(label: str, values: dict[str, Ratio], name: str | None) -> str:
    if name is None:
        return NONE
    if label.endswith("GB"):  # equal in all rounds, but for the digits of numbers in the manifest
        return f"{values[name][0] / (1e9 if name.endswith('bytes') else 1):.3f}"
    return "{:.2f} ({:.2f}-{:.2f})".format(*values[name])
