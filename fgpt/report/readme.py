"""Replacing what stands between a file's markers by generated tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fgpt.errors import UserError
from fgpt.report.records import Record
from fgpt.report.short import GENERATORS
from fgpt.utils.files import write_atomic

MARKER = re.compile(r"^<!-- (/?)bench:(\S*) -->[ \t]*\r?$", re.MULTILINE)


class Block(NamedTuple):
    """A pair of markers."""

    name: str
    start: int
    """Where the text between them begins."""
    end: int
    """Where the second marker begins."""


class Filled(NamedTuple):
    """A file as it is and as it should be."""

    path: Path
    before: str
    after: str
    names: Sequence[str]
    """Of the blocks in it."""
    changed: Sequence[str]
    """Those of them that are not what the records say."""

    def write(self) -> None:
        """Replace the file; one that is right already stays as it is. Raises UserError."""
        if not self.changed:
            return
        try:
            write_atomic(self.path, self.after.encode())
        except OSError as error:
            raise UserError(f"--readme {self.path}: {error.strerror}: cannot be written") from error


def fill(path: Path, records: Sequence[Record]) -> Filled:
    """The file with its tables generated; nothing is written. Raises UserError."""
    try:
        before = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not text"
        raise UserError(f"--readme {path}: {why}: name a Markdown file") from error
    blocks = _blocks(path, before)
    line_end = "\r\n" if "\r\n" in before else "\n"
    after, done, changed = "", 0, []
    for block in blocks:
        text = f"\n{GENERATORS[block.name](records)}\n\n".replace("\n", line_end)
        if before[block.start : block.end] != text:
            changed.append(block.name)
        after += before[done : block.start] + text
        done = block.end
    names = [block.name for block in blocks]
    return Filled(path, before, after + before[done:], names, changed)


def _blocks(path: Path, text: str) -> list[Block]:
    """The pairs of markers, in order; each stands on a line of its own. Raises UserError."""
    blocks: list[Block] = []
    opened: re.Match[str] | None = None
    for marker in MARKER.finditer(text):
        ends, name = marker[1] == "/", marker[2]
        where = f"--readme {path}:{text.count(chr(10), 0, marker.start()) + 1}: {marker[0].strip()}"
        if name not in GENERATORS:
            raise UserError(f"{where}: no such table: known are {', '.join(GENERATORS)}")
        if not ends and (opened is not None or any(block.name == name for block in blocks)):
            why = "stands twice" if opened is None else f"stands inside of bench:{opened[2]}"
            raise UserError(f"{where}: {why}: each table needs a pair of markers of its own")
        if ends and (opened is None or opened[2] != name):
            raise UserError(f"{where}: nothing is open there: put <!-- bench:{name} --> before it")
        if ends and opened is not None:
            blocks.append(Block(name, _line_end(opened, text), marker.start()))
        opened = None if ends else marker
    if opened is not None:
        line = text.count("\n", 0, opened.start()) + 1
        raise UserError(
            f"--readme {path}:{line}: {opened[0].strip()}: is not closed: put"
            f" <!-- /bench:{opened[2]} --> after it"
        )
    if not blocks:
        raise UserError(
            f"--readme {path}: has no marker: put <!-- bench:NAME --> and <!-- /bench:NAME -->"
            f" on lines of their own where a table is to be; NAME: {', '.join(GENERATORS)}"
        )
    return blocks


def _line_end(marker: re.Match[str], text: str) -> int:
    return text.index("\n", marker.start()) + 1
