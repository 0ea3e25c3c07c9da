"""`fgpt report`: flags in, files out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fgpt.errors import UserError
from fgpt.report.contents import contents, markdown
from fgpt.report.page import page
from fgpt.report.reading import read_records
from fgpt.report.readme import Filled, fill
from fgpt.report.records import Record
from fgpt.utils.files import write_atomic

COMMITTED = Path(__file__).resolve().parents[1] / "bench" / "results"
LOCAL = Path("runs/bench")


def report_verb(argv: Sequence[str]) -> int:
    """Write the report; 1 if --check finds a file that is not right. Raises UserError."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.check and arguments.readme is None:
        parser.error("--check has no effect without --readme")
    filled = None
    if arguments.readme is not None:
        files = arguments.files or _jsonl(COMMITTED)
        filled = fill(arguments.readme, read_records(files, each=bool(arguments.files)))
    if arguments.check and filled is not None:
        return _check(filled)
    records = _records(arguments.files)
    _write(records, arguments.out)
    if filled is not None:
        filled.write()
        for name in filled.names:
            state = "written" if name in filled.changed else "as it was"
            print(f"{filled.path}: bench:{name}: {state}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fgpt report",
        description="Tables (table.md), plots (PNG) and one HTML page (index.html) from the records"
        " of `fgpt bench single` and `fgpt bench multi`, and the same tables, shorter, between the"
        " markers <!-- bench:NAME --> and <!-- /bench:NAME --> of a README.",
    )
    add = parser.add_argument
    add(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="JSONL records (default: the committed ones and those in runs/bench)",
    )
    add("--out", type=Path, default=Path("runs/report"), metavar="DIR", help="default: runs/report")
    add(
        "--readme",
        type=Path,
        metavar="FILE",
        help="fill its markers in; without FILEs from the committed records alone",
    )
    add("--check", action="store_true", help="write nothing; 1 if --readme's file would change")
    return parser


def _records(files: Sequence[Path]) -> list[Record]:
    """Of the named files; else the committed ones and, after them, this directory's."""
    records = read_records(files or [*_jsonl(COMMITTED), *_jsonl(LOCAL)], each=bool(files))
    if not records:
        raise UserError(
            f"no record in {COMMITTED} or {LOCAL}: `fgpt bench single` or `multi` writes some"
        )
    return records


def _jsonl(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def _check(filled: Filled) -> int:
    if not filled.changed:
        print(f"{filled.path}: its {len(filled.names)} generated parts are what the records say")
        return 0
    print(
        f"{filled.path}: not what the records say: {', '.join(filled.changed)}:"
        f" fgpt report --readme {filled.path} writes it"
    )
    return 1


def _write(records: Sequence[Record], out: Path) -> None:
    """Everything is made before the first file is written, and each file is whole or absent."""
    _must_be_writable(out)
    parts = contents(records)
    pictures = [picture for part in parts for picture in part.pictures]
    files = {picture.name: picture.png for picture in pictures}
    files |= {"table.md": markdown(parts).encode(), "index.html": page(parts).encode()}
    try:
        for name, data in files.items():
            write_atomic(out / name, data)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: the report is not complete") from error
    tables = sum(len(part.tables) for part in parts)
    print(
        f"{out}: {len(records)} records, {tables} tables (table.md), {len(pictures)} plots (PNG),"
        " index.html"
    )


def _must_be_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(
            f"--out {out}: {error.strerror}: name a directory that can be written"
        ) from error
