"""`fgpt bench single | multi | data`: the verb."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fgpt.bench.scenarios import LADDER, Scenario, single
from fgpt.bench.workloads import WORKLOADS
from fgpt.cli.run_flags import counted
from fgpt.errors import UserError

if TYPE_CHECKING:
    from fgpt.bench.job import Job
    from fgpt.bench.worker_group import WorkerGroup

USAGE = """usage: fgpt bench single | multi | data [--help]

  single   one device: every step from the plain loop to the trainer's defaults, and the memory side
  multi    several ranks: ZeRO stages, tensor, pipeline, context parallel, strong and weak scaling
  data     raw text to shards, and samples per second
"""
# rows of each section: what a CPU does in minutes, what a GPU does with --quick
QUICK_CPU = (("seed-1m", "seed-9m"), ("seed-9m",), ("mini",))
QUICK_GPU = (("seed-71m", "gpt2"), ("gpt2",), ("gpt2",))
_LADDERS = tuple(name for name in WORKLOADS if name != "mini")
ALL_GPU = (_LADDERS, ("seed-286m", "gpt2", "gpt2-xl"), ("gpt2",))
MINUTES_CPU = {"single": 2.5, "multi": 7.0}
MINUTES_GPU = {"single": 120.0, "multi": 60.0}


def bench_verb(argv: Sequence[str]) -> int:
    """Measure, print, append JSON lines. Raises FgptError."""
    if list(argv[:1]) == ["data"]:
        from fgpt.cli.bench_data import bench_data_verb

        return bench_data_verb(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        raise SystemExit(0)
    if not argv or argv[0] not in ("single", "multi"):
        raise UserError(f"bench {' '.join(argv[:1])}: say what to measure: single, multi or data")
    return _measure(argv[0], _parser(argv[0]).parse_args(argv[1:]))


def _measure(bench: str, arguments: argparse.Namespace) -> int:
    import torch

    from fgpt.bench.console import show
    from fgpt.bench.run import Options, run
    from fgpt.bench.worker_group import slots_of
    from fgpt.distributed.launch import device_kind

    console = Console(width=None if os.isatty(1) else 120)
    device = torch.device(device_kind())
    hostfile: Path | None = getattr(arguments, "hostfile", None)
    traces: Path | None = arguments.trace
    if traces is not None:
        _make_folder(traces, hostfile)
    on_cpu = device.type == "cpu"
    minutes = arguments.minutes or (MINUTES_CPU if on_cpu else MINUTES_GPU)[bench]
    options = Options(
        out=arguments.out,
        budget_s=60 * minutes,
        again=arguments.again or traces is not None,
        say=partial(console.print, highlight=False, markup=False),
        extras=partial(_extras, bench, traces),
        start=_starter(hostfile, arguments.out.parent.absolute()),
        hosts=None if hostfile is None else slots_of(hostfile),
    )
    records = run(_scenarios(bench, arguments, device), device, options)
    show(console, records)
    console.print(f"records: {arguments.out}; tables and plots: fgpt report", highlight=False)
    bad = [r for r in records if r["state"] == "wrong" or _unexpected(r)]
    for one in bad:
        console.print(f"{one['row']}, {one['env_name']}: {one['state']}: {one['why']}", style="red")
    return 1 if bad else 0


def _unexpected(one: dict[str, Any]) -> bool:
    """A failure that is not a finding: too little memory is one."""
    return one["state"] == "failed" and "out of memory" not in one["why"]


def _scenarios(bench: str, arguments: argparse.Namespace, device: Any) -> list[Scenario]:
    import torch

    from fgpt.bench.layouts import multi
    from fgpt.bench.worker_group import slots_of

    if bench == "multi":
        row = WORKLOADS[arguments.row or ("mini" if device.type == "cpu" else "gpt2")]
        slots = sum(slots_of(arguments.hostfile).values()) if arguments.hostfile else 0
        ranks = arguments.ranks or slots or max(4, torch.cuda.device_count())
        return list(multi(row, ranks))
    if arguments.rows:
        rows: Any = (arguments.rows,) * 3
    elif device.type == "cpu":
        rows = QUICK_CPU
    else:
        rows = QUICK_GPU if arguments.quick else ALL_GPU
    only = set(arguments.only or ())
    found = list(single(*rows))
    if unknown := only - {s.rung.name for s in found}:
        known = ", ".join(dict.fromkeys(s.rung.name for s in found))
        raise UserError(f"--only {', '.join(sorted(unknown))}: unknown; there are: {known}")
    kept = only | {s.reference for s in found if s.rung.name in only}
    return [s for s in found if not only or s.rung.name in kept]


def _make_folder(traces: Path, hostfile: Path | None) -> None:
    if hostfile is not None:
        raise UserError("--trace with --hostfile: traces are of this machine's ranks only")
    try:
        traces.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--trace {traces}: {error.strerror}: name a folder") from error


def _starter(hostfile: Path | None, folder: Path) -> Callable[[Job], WorkerGroup]:
    from fgpt.bench.worker_group import RemoteWorkerGroup, WorkerGroup

    if hostfile is None:
        return WorkerGroup
    return partial(RemoteWorkerGroup, hostfile=hostfile, folder=folder)


def _extras(
    bench: str, traces: Path | None, team: WorkerGroup, scenario: Scenario
) -> dict[str, Any]:
    """Shares where there are several ranks; a trace where one is asked for."""
    found: dict[str, Any] = {}
    if bench == "multi" and scenario.rung.ranks > 1:
        found |= team.ask("shares")
    if traces is not None:
        name = f"{scenario.row.name}-{scenario.rung.name}.json.gz".replace(" ", "_")
        found |= team.ask("trace", file=str((traces / name).absolute()))
    return found


def _parser(bench: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"fgpt bench {bench}")
    add = parser.add_argument
    if bench == "single":
        parser.description = (
            "samples/s, tokens/s, MFU and memory of each rung of the ladder"
            f" ({', '.join(rung.name for rung in LADDER)}), side by side in one run"
        )
        add(
            "--rows",
            nargs="+",
            choices=list(WORKLOADS),
            metavar="ROW",
            help=f"{', '.join(WORKLOADS)}",
        )
        add("--only", nargs="+", metavar="RUNG", help="these rungs and what they are compared with")
        add("--quick", action="store_true", help="on a GPU: two rows only")
    else:
        parser.description = "the same over several ranks of this machine, or of --hostfile's"
        add(
            "--row",
            choices=list(WORKLOADS),
            metavar="ROW",
            help="default: mini on CPUs, gpt2 on GPUs",
        )
        add("--ranks", type=counted, metavar="N", help="at most (default: GPUs, at least 4)")
        add("--hostfile", type=Path, metavar="FILE", help="many nodes: DeepSpeed's hostfile")
    add("--minutes", type=_minutes, metavar="M", help="time for all of it, about")
    add("--again", action="store_true", help="measure what has been measured, too")
    add("--trace", type=Path, metavar="DIR", help="torch's profiler over two steps of each")
    out = Path(f"runs/bench/{bench}.jsonl")
    add("--out", type=Path, default=out, metavar="FILE", help=f"default: {out}")
    return parser


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes")
    return minutes
