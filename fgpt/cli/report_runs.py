"""`fgpt report RUN ...` and `fgpt runs`: training runs, while they run or afterwards."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.errors import UserError, printable
from fgpt.report.run_page import run_page
from fgpt.report.run_plots import curve_gif, terminal_plot
from fgpt.report.run_record import METRICS, RunRecord, distinct_names, read_run
from fgpt.report.run_summary import describe, summary_of
from fgpt.utils.files import check_writable, write_atomic

PAGE, GIF = "report.html", "curve.gif"
COLOURS = ("blue", "yellow", "green", "magenta", "red", "cyan")
PLOT_ROWS = 16
RUNS = Path("runs")


def report_runs(arguments: argparse.Namespace) -> int:
    """Write the page of the runs in `arguments.files`, or plot them. Raises UserError."""
    paths: list[Path] = arguments.files
    out = arguments.out or (paths[0] if len(paths) == 1 else RUNS / "report")
    if arguments.terminal:
        return _in_terminal(paths, arguments.follow)
    try:
        check_writable(out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a directory to write") from error
    runs = _read(paths)
    try:
        while arguments.follow is not None and any(run.is_running for run in runs):
            _write(runs, out, arguments.follow)
            time.sleep(arguments.follow)
            runs = _read(paths)
    except KeyboardInterrupt:
        _write(runs, out, None)  # a page that no browser renews
        raise
    _write(runs, out, None)
    return 0


def _read(paths: Sequence[Path]) -> list[RunRecord]:
    names = distinct_names(paths)
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _write(runs: Sequence[RunRecord], out: Path, refresh_s: int | None) -> None:
    # a name may have bytes that are no text
    files = {PAGE: run_page(runs, refresh_s).encode(errors="backslashreplace")}
    if len(runs) == 1 and runs[0].records.steps and refresh_s is None:
        files[GIF] = curve_gif(runs[0])
    try:
        for name, data in files.items():
            write_atomic(out / name, data)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: the report is not complete") from error
    steps = ", ".join(
        f"{run.name} at step {run.records.steps[-1]['step'] if run.records.steps else 0}"
        for run in runs
    )
    print(printable(f"{' and '.join(str(out / name) for name in files)}: {steps}"), flush=True)


# ---- in a terminal -----------------------------------------------------------------------------


def _in_terminal(paths: Sequence[Path], follow_s: int | None) -> int:
    console = Console(width=None if sys.stdout.isatty() else 100)
    if follow_s is None:
        console.print(_drawn(_read(paths), console.width))
        return 0
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            runs = _read(paths)
            live.update(_drawn(runs, console.width), refresh=True)
            if not any(run.is_running for run in runs):
                break
            time.sleep(follow_s)
    print()  # Live leaves the cursor behind the last line
    return 0


def _drawn(runs: Sequence[RunRecord], width: int) -> Group:
    """Loss curves against the step, and the numbers below them."""
    curves: list[tuple[Sequence[float], Sequence[float]]] = []
    for run in runs:
        found = run.records.curves()
        curves += [(found.steps, found.losses), (found.valid_steps, found.valid_losses)]
    losses = [y for _, ys in curves for y in ys]
    steps = [x for xs, _ in curves for x in xs]
    if not losses:
        return Group(Text("no step yet"))
    cells = terminal_plot(curves, max(20, width - 10), PLOT_ROWS)
    low, high = min(losses), max(losses)
    lines = []
    for i, row in enumerate(cells):
        label = f"{high - (high - low) * i / (PLOT_ROWS - 1):8.3f} " if i % 5 == 0 else " " * 9
        line = Text(label, style="dim")
        for cell in row:
            number = (cell >> 8) - 1
            line.append(chr(0x2800 + (cell & 0xFF)), COLOURS[number % len(COLOURS)] if cell else "")
        lines.append(line)
    lines.append(Text(f"{' ' * 9}step {min(steps):,} to {max(steps):,}", style="dim"))
    numbers = Table(box=None, pad_edge=False)
    numbers.add_column("loss in nats per token")
    summaries = [summary_of(run) for run in runs]
    for i, run in enumerate(runs):
        heading = Text(printable(run.name))
        for offset, kind in enumerate(("training", "validation")):
            colour = COLOURS[(2 * i + offset) % len(COLOURS)]
            heading.append(f" {kind} ({colour})", colour)
        numbers.add_column(heading)
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        cells_of = [Text(printable(summary.get(name, ""))) for summary in summaries]
        numbers.add_row(Text(name, style="bold"), *cells_of)
    return Group(*lines, numbers)


# ---- fgpt runs ---------------------------------------------------------------------------------


def runs_verb(argv: Sequence[str]) -> int:
    """List runs with their last line. Raises UserError."""
    parser = ArgumentParser(
        prog="fgpt runs",
        description="List training runs with their last line, the newest first.",
        examples=["fgpt runs", "fgpt runs runs /scratch/runs"],
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=file_path,
        default=[RUNS],
        metavar="DIR",
        help="folders with run directories, at any depth up to 3 (default: runs)",
    )
    found = [run for folder in parser.parse_args(argv).folders for run in _runs_below(folder)]
    table = Table(box=None, pad_edge=False)
    for heading in (
        "run",
        "state",
        "step",
        "loss",
        "valid loss",
        "tokens/s",
        "last record",
        "model",
    ):
        table.add_column(heading, no_wrap=True)
    for run in sorted(found, key=lambda run: run.age_s):
        table.add_row(*(Text(printable(cell)) for cell in _last_line(run)))
    Console(width=None if sys.stdout.isatty() else 1000).print(table)  # a pipe has no width
    return 0


def _runs_below(folder: Path) -> Iterator[RunRecord]:
    """The runs in a folder. Raises UserError if there is none."""
    patterns = ("", "*/", "*/*/", "*/*/*/")
    paths = [path.parent for depth in patterns for path in sorted(folder.glob(depth + METRICS))]
    if not paths:
        raise UserError(f"{folder}: no training run there; name a folder with run directories")
    for path in paths:
        try:
            yield read_run(path, str(path))
        except UserError as error:
            print(f"fgpt: {error}", file=sys.stderr)  # the others are listed


def _last_line(run: RunRecord) -> list[str]:
    summary = summary_of(run)
    last = run.records.steps[-1] if run.records.steps else {}
    speed = last.get("tokens_per_s")
    return [
        run.name,
        run.state,
        summary["steps"].replace(" of ", "/"),
        summary.get("training loss", ""),
        summary.get("validation loss", ""),
        f"{speed:,.0f}" if isinstance(speed, float) else "",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - run.age_s)),
        describe(run),
    ]
