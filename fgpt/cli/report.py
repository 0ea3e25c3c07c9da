"""`fgpt report`: flags, and the files that it writes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import counted
from fgpt.errors import UserError
from fgpt.report.checkpoint_table import read_save_records, save_tables
from fgpt.report.document import ReportPart, report_parts, to_html, to_markdown
from fgpt.report.ladder_report import ladder_parts, ladder_tables, read_ladder_records
from fgpt.report.readme_tables import FilledReadme, fill_readme
from fgpt.report.recipe_report import read_recipe_records, recipe_parts, recipe_tables
from fgpt.report.records import read_records
from fgpt.utils.files import write_atomic

COMMITTED = Path(__file__).resolve().parents[1] / "bench" / "results"
LOCAL = Path("runs/bench")
EXAMPLES = (
    "fgpt report",
    "fgpt report runs/tiny-zero2 --follow 10",
    "fgpt report runs/tiny-zero2 runs/tiny-bf16 --out runs/compared",
)


def report_verb(argv: Sequence[str]) -> int:
    """Write the report; 1 if --check finds an outdated table. Raises UserError."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.check and arguments.readme is None:
        parser.error("--check has no effect without --readme")
    named: list[Path] = arguments.files
    for path in named:
        if not os.path.lexists(path):
            raise UserError(
                f"{path}: does not exist; name a run directory (`fgpt runs` lists them) or a file"
                " of records"
            )
    if any(path.is_dir() for path in named):
        return _of_runs(arguments)
    if arguments.terminal or arguments.follow is not None:
        raise UserError("--terminal and --follow are for training runs: name their directories")
    out = arguments.out or Path("runs/report")
    filled = None
    if arguments.readme is not None:
        paths = named or _jsonl(COMMITTED)
        records = read_records(paths, require_records=bool(named))
        other_tables = {
            "checkpoint": save_tables(read_save_records(paths)),
            "recipe": recipe_tables(read_recipe_records(paths)),
            "ladder": ladder_tables(read_ladder_records(paths)),
        }
        filled = fill_readme(arguments.readme, records, other_tables)
        if arguments.check:
            return _check(filled)
    paths = named or [*_jsonl(COMMITTED), *_jsonl(LOCAL)]
    recipes, ladders = read_recipe_records(paths), read_ladder_records(paths)
    others = [*recipe_parts(recipes), *ladder_parts(ladders)]
    records = read_records(paths, require_records=bool(named) and not others)
    if not records and not others:
        raise UserError(
            f"no record in {COMMITTED} or {LOCAL}: run `fgpt bench single`, `fgpt bench multi` or"
            " `fgpt bench recipe`"
        )
    _write(len(records) + len(others), [*report_parts(records), *others], out)
    if filled is not None:
        filled.write()
        for name in filled.names:
            state = "written" if name in filled.changed else "unchanged"
            print(f"{filled.path}: bench:{name}: {state}")
    return 0


def _of_runs(arguments: argparse.Namespace) -> int:
    """Report training runs instead of benchmarks. Raises UserError."""
    if files := [path for path in arguments.files if not path.is_dir()]:
        raise UserError(f"{files[0]}: name either run directories or files of records")
    if arguments.readme is not None:
        raise UserError("--readme is for records of benchmarks, not for training runs")
    from fgpt.cli.report_runs import report_runs

    return report_runs(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt report",
        description="Of training runs: one HTML page (report.html) with curves, samples, lineage"
        " and configuration, and an animated loss curve (curve.gif). Else: tables (table.md), plots"
        " (PNG) and one HTML page (index.html) from the records of `fgpt bench single` and `fgpt"
        " bench multi`, and short tables between the markers <!-- bench:NAME --> and <!--"
        " /bench:NAME --> of a README.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "files",
        type=file_path,
        nargs="*",
        metavar="RUN|FILE",
        help="run directories, or JSONL records (default: the committed ones and those in"
        " runs/bench)",
    )
    add(
        "--out",
        type=file_path,
        metavar="DIR",
        help="default: the run directory if one is named, else runs/report",
    )
    add("--terminal", action="store_true", help="plot the runs here, as over ssh; write nothing")
    add(
        "--follow",
        type=counted,
        nargs="?",
        const=10,
        metavar="S",
        help="renew it every S seconds (default 10) while a run goes on",
    )
    add(
        "--readme",
        type=file_path,
        metavar="FILE",
        help="also fill its markers; without FILEs from the committed records only",
    )
    add(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 if --readme's tables are outdated",
    )
    return parser


def _jsonl(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def _check(filled: FilledReadme) -> int:
    if not filled.changed:
        print(f"{filled.path}: its {len(filled.names)} generated tables are up to date")
        return 0
    print(
        f"{filled.path}: outdated tables: {', '.join(filled.changed)}: run fgpt report --readme"
        f" {filled.path}"
    )
    return 1


def _write(n_records: int, parts: Sequence[ReportPart], out: Path) -> None:
    """Generate everything before writing the first file; each file is replaced atomically."""
    _must_be_writable(out)
    pictures = [picture for part in parts for picture in part.pictures]
    files = {picture.name: picture.png for picture in pictures}
    files |= {"table.md": to_markdown(parts).encode(), "index.html": to_html(parts).encode()}
    try:
        for name, data in files.items():
            write_atomic(out / name, data)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: the report is not complete") from error
    tables = sum(len(part.tables) for part in parts)
    print(
        f"{out}: {n_records} records, {tables} tables (table.md), {len(pictures)} plots (PNG),"
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
