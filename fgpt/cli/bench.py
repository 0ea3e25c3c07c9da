"""`fgpt bench single | multi`: flags, and the table that it prints."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fgpt.bench.scenarios import (
    LADDER,
    MINIMUM_RANKS,
    WORKLOADS,
    Scenario,
    multi_rank_scenarios,
    scenario_flags,
    single_device_scenarios,
)
from fgpt.cli.arguments import ArgumentParser, file_path, with_examples
from fgpt.cli.run_flags import counted
from fgpt.errors import UserError
from fgpt.utils.keys import did_you_mean

if TYPE_CHECKING:
    from fgpt.bench.job import Job
    from fgpt.bench.worker_group import WorkerGroup

USAGE = """usage: fgpt bench single | multi | data | checkpoint | recipe | watching | NAME [--help]

  single   one device: the optimizations from a plain loop to FGPT's defaults, and memory
  multi    several ranks: ZeRO stages, tensor, pipeline, context parallel, strong and weak scaling
  data     raw text to shards, and samples per second
  checkpoint  saving and loading against DeepSpeed's own checkpoints
  recipe   tokens and seconds that recipes take to a validation loss, side by side; --ladder: a
           law of the loss over sizes and tokens; --coordinate-check, --rate-transfer: muP
  watching what the watchdog and guarded output take from a step
  NAME     one scenario beside the one that it is compared with, or one model's ladder:
"""
EXAMPLES = {
    "single": "fgpt bench single --rows seed-1m seed-9m --minutes 5",
    "multi": "fgpt bench multi --ranks 4 --minutes 5",
}
# workloads of each section: what a CPU measures in minutes, and a GPU with --quick
QUICK_CPU = (("seed-1m", "seed-9m"), ("seed-9m",), ("mini",))
QUICK_GPU = (("seed-71m", "gpt2"), ("gpt2",), ("gpt2",))
_LADDERS = tuple(name for name in WORKLOADS if name != "mini")
ALL_GPU = (_LADDERS, ("seed-286m", "gpt2", "gpt2-xl"), ("gpt2",))
MINUTES_CPU = {"single": 8.0, "multi": 7.0}
MINUTES_GPU = {"single": 120.0, "multi": 60.0}
COLUMNS = ("env_name", "ranks", "train SPS", "x ref", "predict SPS", "x ref", "GB", "loss")


def bench_verb(argv: Sequence[str]) -> int:
    """Measure, print, append JSON lines; 1 if a variant is wrong or fails. Raises FgptError."""
    if list(argv[:1]) == ["data"]:
        from fgpt.cli.bench_data import bench_data_verb

        return bench_data_verb(argv[1:])
    if list(argv[:1]) == ["checkpoint"]:
        from fgpt.cli.bench_checkpoint import bench_checkpoint_verb

        return bench_checkpoint_verb(argv[1:])
    if list(argv[:1]) == ["recipe"]:
        from fgpt.cli.bench_recipe import bench_recipe_verb

        return bench_recipe_verb(argv[1:])
    if list(argv[:1]) == ["watching"]:
        from fgpt.cli.bench_watching import bench_watching_verb

        return bench_watching_verb(argv[1:])
    names = scenario_flags()
    if argv and argv[0] in ("-h", "--help"):
        lines = textwrap.wrap(" ".join(names), 80, break_on_hyphens=False)
        print(USAGE + textwrap.indent("\n".join(lines), " " * 11))
        print(with_examples([*EXAMPLES.values()]), end="")
        raise SystemExit(0)
    name, rest = argv[0] if argv else "", argv[1:]
    if name not in ("single", "multi"):
        if name not in names:
            known = ("single", "multi", "data", "checkpoint", "recipe", "watching", *names)
            raise UserError(
                f"bench {name}: unknown benchmark{did_you_mean(name, known)}; name one of"
                f" {', '.join(known)}"
            )
        name, *flags = names[name]
        rest = [*flags, *rest]
    return _measure(name, _parser(name).parse_args(rest))


def _measure(bench: str, arguments: argparse.Namespace) -> int:
    import torch

    from fgpt.bench.run import Options, run_scenarios
    from fgpt.bench.worker_group import RemoteWorkerGroup, WorkerGroup, slots_of
    from fgpt.distributed.launch import device_kind

    console = Console(width=None if os.isatty(1) else 120)
    device = torch.device(device_kind())
    hostfile: Path | None = getattr(arguments, "hostfile", None)
    traces: Path | None = arguments.trace
    if traces is not None:
        _make_trace_folder(traces, hostfile)
    minutes = arguments.minutes or (MINUTES_CPU if device.type == "cpu" else MINUTES_GPU)[bench]
    hosts: dict[str, int] | None = None
    start: Callable[[Job], WorkerGroup] = WorkerGroup
    if hostfile is not None:
        hosts, folder = slots_of(hostfile), arguments.out.parent.absolute()
        start = partial(RemoteWorkerGroup, hostfile=hostfile, folder=folder)
    options = Options(
        out=arguments.out,
        budget_s=60 * minutes,
        again=arguments.again or traces is not None,
        log=partial(console.print, highlight=False, markup=False),
        request_details=partial(_request_details, bench, traces),
        start=start,
        hosts=hosts,
    )
    if bench == "multi":
        n_ranks = arguments.ranks or sum((hosts or {}).values())
        n_ranks = n_ranks or max(MINIMUM_RANKS, torch.cuda.device_count())
        workload = WORKLOADS[arguments.row or ("mini" if device.type == "cpu" else "gpt2")]
        scenarios = _only(list(multi_rank_scenarios(workload, n_ranks)), arguments.only)
    else:
        scenarios = _single_scenarios(arguments, device.type)
    records = run_scenarios(scenarios, device, options)
    _print_tables(console, records)
    console.print(f"records: {arguments.out}; tables and plots: fgpt report", highlight=False)
    bad = [record for record in records if _is_bad(record)]
    for record in bad:
        line = f"{record['row']}, {record['env_name']}: {record['state']}: {record['why']}"
        console.print(line, style="red")
    return 1 if bad else 0


def _is_bad(record: dict[str, Any]) -> bool:
    """Wrong losses or a failure; running out of memory is a result."""
    failed = record["state"] == "failed" and "out of memory" not in record["why"]
    return record["state"] == "wrong" or failed


def _single_scenarios(arguments: argparse.Namespace, device: str) -> list[Scenario]:
    """The scenarios of --rows, --quick and --only. Raises UserError for an unknown variant."""
    if arguments.rows:
        workloads: Any = (arguments.rows,) * 3
    elif device == "cpu":
        workloads = QUICK_CPU
    else:
        workloads = QUICK_GPU if arguments.quick else ALL_GPU
    return _only(list(single_device_scenarios(*workloads)), arguments.only)


def _only(scenarios: list[Scenario], variants: Sequence[str] | None) -> list[Scenario]:
    """The scenarios of these variants, and of those that they are compared with; None: all."""
    if not variants:
        return scenarios
    names = dict.fromkeys(scenario.variant.name for scenario in scenarios)
    only = set(variants)
    if unknown := only - {*names}:
        raise UserError(
            f"--only {', '.join(sorted(unknown))}: unknown; known are: {', '.join(names)}"
        )
    kept = only | {scenario.reference for scenario in scenarios if scenario.variant.name in only}
    return [scenario for scenario in scenarios if scenario.variant.name in kept]


def _make_trace_folder(traces: Path, hostfile: Path | None) -> None:
    if hostfile is not None:
        raise UserError("--trace with --hostfile: only ranks of this machine can be traced")
    try:
        traces.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--trace {traces}: {error.strerror}: name a folder") from error


def _request_details(
    bench: str, traces: Path | None, group: WorkerGroup, scenario: Scenario
) -> dict[str, Any]:
    """Request the time breakdown of several ranks, and a trace with --trace."""
    details: dict[str, Any] = {}
    if bench == "multi" and scenario.variant.ranks > 1:
        details |= group.request("breakdown")
    if traces is not None:
        name = f"{scenario.workload.name}-{scenario.variant.name}.json.gz".replace(" ", "_")
        details |= group.request("trace", file=str((traces / name).absolute()))
    return details


def _print_tables(console: Console, records: Sequence[dict[str, Any]]) -> None:
    """Print a table for each workload and section, in the records' order."""
    for row, section in dict.fromkeys((r["row"], r["section"]) for r in records):
        group = [r for r in records if (r["row"], r["section"]) == (row, section)]
        table = Table(
            title=f"{row} ({group[0]['parameters'] / 1e9:.3f} B parameters), {section};"
            f" x: relative to {group[0]['reference']}",
            title_justify="left",
        )
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in ("env_name", "loss") else "right")
        unmeasured = []
        for record in group:
            if record["state"] in ("measured", "wrong"):
                table.add_row(*_cells(record))
            else:
                unmeasured.append(f"  {record['env_name']}: {record['state']}: {record['why']}")
        console.print(table)
        for line in unmeasured:
            console.print(line, highlight=False)


def _cells(record: dict[str, Any]) -> list[str]:
    from fgpt.bench.scenario_record import samples_per_s

    ratio = record["ratio"] or {}
    loss = f"{record['losses'][-1]:.4f}" + ("  WRONG" if record["state"] == "wrong" else "")
    cells = [record["env_name"], str(record["ranks"])]
    for kind in ("train", "predict"):
        cells.append(f"{samples_per_s(record, kind):,.1f}")
        cells.append("" if kind not in ratio else "{:.2f} ({:.2f}-{:.2f})".format(*ratio[kind]))
    return [*cells, f"{record['memory']['peak_bytes'] / 1e9:.2f}", loss]


def _parser(bench: str) -> argparse.ArgumentParser:
    parser = ArgumentParser(prog=f"fgpt bench {bench}", examples=[EXAMPLES[bench]])
    add = parser.add_argument
    if bench == "single":
        names = ", ".join(variant.name for variant in LADDER)
        parser.description = (
            f"samples/s, tokens/s, MFU and memory of each variant ({names}), side by side in one"
            " run"
        )
        models = ", ".join(WORKLOADS)
        add(
            "--rows",
            nargs="+",
            action="extend",
            choices=list(WORKLOADS),
            metavar="MODEL",
            help=models,
        )
        add("--quick", action="store_true", help="on a GPU: only two models")
    else:
        parser.description = "the same over several ranks of this machine, or of --hostfile's nodes"
        row = "default: mini on CPUs, gpt2 on GPUs"
        add("--row", choices=list(WORKLOADS), metavar="MODEL", help=row)
        ranks = "largest number of ranks (default: number of GPUs, at least 4)"
        add("--ranks", type=counted, metavar="N", help=ranks)
        add(
            "--hostfile",
            type=file_path,
            metavar="FILE",
            help="DeepSpeed's hostfile, for many nodes",
        )
    only = "measure only these variants and the one that they are compared with"
    add("--only", nargs="+", action="extend", metavar="VARIANT", help=only)
    add("--minutes", type=_minutes, metavar="M", help="time for all measurements")
    add("--again", action="store_true", help="also measure scenarios that have a record")
    add(
        "--trace",
        type=file_path,
        metavar="DIR",
        help="profile two steps of each with torch's profiler",
    )
    out = Path(f"runs/bench/{bench}.jsonl")
    add("--out", type=file_path, default=out, metavar="FILE", help=f"default: {out}")
    return parser


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes")
    return minutes
