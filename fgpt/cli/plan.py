"""`fgpt plan`: will it fit, which layout, how fast, what will it cost."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import add_run_flags, counted, request_of
from fgpt.config.batch import GLOBAL, MICRO
from fgpt.config.presets import PRESETS
from fgpt.config.resolve import resolve
from fgpt.config.run_file import Override, load
from fgpt.errors import ConfigError, UserError
from fgpt.model.count import n_params
from fgpt.plan.budget import Budget, budget_of
from fgpt.plan.cluster import Cluster, find_device
from fgpt.plan.failures import DEVICE_MTBF_H
from fgpt.plan.planned_run import planned_run
from fgpt.plan.search import Candidate, SearchSpace, largest_micro_batch, neighbours, search
from fgpt.utils.files import write_atomic

DEFAULT_TOKENS = ((1e9, 2**19), (5e9, 2**20), (5e10, 2**21), (float("inf"), 2**22))
"""Parameters below this -> tokens of a step without --global_batch, about Brown et al. 2020's."""
SHOWN = 5
OPENING, CLOSING = "<!-- published -->", "<!-- /published -->"
"""Around the tables that --readme writes."""
MAX_GPUS = 2**20
TOKENS_PER_PARAMETER = 20
"""Of --for without --tokens: Hoffmann et al. 2022."""


def plan_verb(argv: Sequence[str]) -> int:
    """Print the plan; returns 1 if it does not fit. Raises FgptError."""
    arguments = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if arguments.published is not None:
        return _judge(arguments.published, arguments.readme)
    if arguments.gpu is None:
        raise UserError("--gpu: name the kind of GPU, such as --gpu h100-80g")
    cluster = _cluster(arguments, arguments.gpus)
    chooses = arguments.fit or arguments.cheapest or arguments.size or arguments.days
    if not chooses:
        if arguments.write is not None:
            raise UserError("--write: writes the files of a chosen layout; add --fit")
        return _plan(arguments, cluster, console)
    space = _space(arguments, cluster)
    return _fit(arguments, space, console)


def _plan(arguments: argparse.Namespace, cluster: Cluster, console: Console) -> int:
    """Of the layout that the files and flags say."""
    if arguments.ds_config is None:
        raise UserError("--ds_config: name the DeepSpeed JSON, or let --fit choose the layout")
    resolved = resolve(request_of(arguments), world=cluster.gpus, device="cuda")
    candidate = Candidate(planned_run(resolved), cluster)
    tokens = candidate.run.tokens_per_step * resolved.run.train.steps
    budget = _budget(arguments, candidate, tokens)
    if arguments.max_batch:
        largest = largest_micro_batch(candidate.run, cluster)
        print(f"largest micro-batch that fits: {largest} samples of {resolved.seq_len} tokens")
        return 0 if largest else 1
    _show(arguments, [candidate], budget, console)
    return 0 if candidate.fits else 1


def _fit(arguments: argparse.Namespace, space: SearchSpace, console: Console) -> int:
    """Of the fastest layout that fits; of the GPUs that --days or --cheapest leave."""
    if arguments.max_batch:
        raise UserError("--max_batch: is asked of the layout of --ds_config; leave --fit out")
    if arguments.cheapest or arguments.days is not None:
        space = _choose_gpus(arguments, space)
    found = search(space)
    if not found:
        raise UserError(_why_nothing_fits(space))
    best = found[0]
    from fgpt.plan.configuration import deepspeed_json, resolved_of
    from fgpt.plan.present import render_candidates

    # a model that FGPT refuses has no plan
    config = deepspeed_json(best.run, n_params(best.run.model))
    resolved_of(config, best.run, "ds_config.json", arguments.write or Path())

    _show(arguments, found[: SHOWN + 1], _budget(arguments, best, None), console)
    if not arguments.json:
        print("\nthe next ones that fit:")
        render_candidates(found[1 : SHOWN + 1], console)
        print("\none step away:")
        for what, other in neighbours(best, space):
            print(f"  {what}: {_compared(best, other)}")
    if arguments.write is not None:
        _write(arguments.write, best, config)
    return 0


def _compared(best: Candidate, other: Candidate) -> str:
    """Why a layout one step away is not the chosen one."""
    if other.margin_gib >= 0 > other.host_margin_gib:
        return f"does not fit, {-other.host_margin_gib:,.0f} GiB of host memory too much"
    if not other.fits:
        return f"does not fit, {-other.margin_gib:,.1f} GiB too much"
    if not other.is_safe:
        return f"leaves only {other.margin_gib:,.1f} GiB"
    return f"{other.time.total / best.time.total - 1:+.1%} time of a step"


def _choose_gpus(arguments: argparse.Namespace, space: SearchSpace) -> SearchSpace:
    """The space of the fewest GPUs, in whole nodes doubled again and again, that train in --days;
    with --cheapest that of the lowest price, or of the fewest GPU hours without prices.
    """
    if _tokens(arguments) is None and arguments.size is None:
        raise UserError("--days, --cheapest: also say the training tokens, as in --tokens 1.4e12")
    tried, cheapest = [], (math.inf, space)
    gpus = space.cluster.gpus_per_node
    while gpus <= MAX_GPUS:
        larger = replace(space, cluster=replace(space.cluster, gpus=gpus))
        gpus *= 2
        found = search(larger)
        if not found:
            continue
        budget = _budget(arguments, found[0], None)
        assert budget is not None  # there are tokens
        tried.append(f"{larger.cluster.gpus:,} GPUs: {budget.days:,.1f} days")
        if arguments.days is not None and budget.days > arguments.days:
            continue
        if not arguments.cheapest:
            return larger
        price = budget.days * larger.cluster.gpus if budget.money is None else budget.money
        cheapest = min(cheapest, (price, larger), key=lambda pair: pair[0])
    if cheapest[0] < math.inf:
        return cheapest[1]
    what = f"--days {arguments.days:g}: not reached; " if tried else "nothing fits on any number"
    raise UserError(what + "; ".join(tried[-3:]))


def _why_nothing_fits(space: SearchSpace) -> str:
    candidates = list(space.candidates())
    cluster = space.cluster
    if not candidates:
        return (
            f"no layout of {cluster.gpus:,} GPUs divides --global_batch {space.global_batch:,} and"
            f" the model: change --global_batch or --gpus"
        )
    nearest = max(candidates, key=lambda c: min(c.margin_gib, c.host_margin_gib))
    from fgpt.plan.present import describe, fit_line

    return (
        f"{space.model.preset} does not fit on {cluster.gpus:,} x {cluster.device.name}: the"
        f" nearest layout ({describe(nearest)}) {fit_line(nearest)}; use more GPUs"
    )


def _show(
    arguments: argparse.Namespace,
    candidates: Sequence[Candidate],
    budget: Budget | None,
    console: Console,
) -> None:
    """Print the first candidate, and write the page with all of them."""
    from fgpt.plan.present import as_json, render_plan

    if arguments.html is not None:
        from fgpt.report.plan_page import plan_page

        _write_file(arguments.html, plan_page(candidates, budget), "--html")
    if arguments.json:
        print(json.dumps(as_json(candidates[0], budget), indent=2))
    else:
        render_plan(candidates[0], budget, console)


def _write(folder: Path, candidate: Candidate, deepspeed: dict[str, Any]) -> None:
    """Write the DeepSpeed JSON and the run file."""
    from fgpt.plan.configuration import run_file

    files = {"ds_config.json": deepspeed, "run.json": run_file(candidate.run)}
    taken = next((name for name in files if os.path.lexists(folder / name)), None)
    if taken is not None:
        raise UserError(f"--write {folder}: {taken} exists already; choose a new directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--write {folder}: {error.strerror}; name a new directory") from error
    for name, content in files.items():
        _write_file(folder / name, json.dumps(content, indent=2) + "\n", "--write")
    nodes = f"--num_nodes {candidate.cluster.nodes} " if candidate.cluster.nodes > 1 else ""
    per_node = min(candidate.cluster.gpus_per_node, candidate.cluster.gpus)
    print(
        f"\nlaunch it: deepspeed {nodes}--num_gpus {per_node} launchers/train.py --ds_config"
        f" {folder}/ds_config.json --run_file {folder}/run.json --data DIR"
    )


def _write_file(path: Path, text: str, flag: str) -> None:
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; name a file to write") from error


def _space(arguments: argparse.Namespace, cluster: Cluster) -> SearchSpace:
    overrides = tuple(arguments.overrides)
    if arguments.size is not None:
        overrides = (*overrides, Override("model.preset", _preset(arguments.size), "--for"))
    loaded = load(arguments.run, overrides)
    if any(issue.grade == "error" for issue in loaded.issues):
        raise ConfigError(loaded.issues)
    run = loaded.run
    seq_len = run.data.seq_len or run.model.max_seq_len
    given = _flag(arguments.deepspeed_flags, GLOBAL)
    if _flag(arguments.deepspeed_flags, MICRO) is not None:
        raise UserError("--micro_batch: --fit chooses it; leave it out")
    if given is None:
        tokens = next(t for limit, t in DEFAULT_TOKENS if n_params(run.model) < limit)
        given = max(tokens // seq_len, 1)
    return SearchSpace(
        run.model, cluster, seq_len, given, arguments.precision, not arguments.no_offload
    )


def _preset(size: str) -> str:
    """The preset whose parameters are the nearest to a size such as 70b."""
    units = {"m": 1e6, "b": 1e9, "t": 1e12}
    try:
        wanted = float(size[:-1]) * units[size[-1:].lower()]
    except (ValueError, KeyError):
        wanted = 0.0
    if not 1e6 <= wanted <= 1e13:
        raise UserError(f"--for {size}: write a number of parameters, such as 70b; or use --model")
    return min(PRESETS, key=lambda name: abs(math.log(n_params(PRESETS[name]) / wanted)))


def _cluster(arguments: argparse.Namespace, gpus: int) -> Cluster:
    device = find_device(arguments.gpu, arguments.hardware)
    if gpus > MAX_GPUS:
        raise UserError(f"--gpus {gpus}: at most {MAX_GPUS} are planned")
    per_node = arguments.gpus_per_node
    if arguments.nodes is not None:
        if gpus % arguments.nodes:
            raise UserError(f"--nodes {arguments.nodes}: does not divide --gpus {gpus}")
        per_node = gpus // arguments.nodes
    per_node = per_node or min(device.gpus_per_node, gpus)
    if gpus > per_node and gpus % per_node:
        raise UserError(f"--gpus {gpus}: is no multiple of {per_node} in a node; --gpus_per_node")
    return Cluster(device, gpus, per_node, arguments.network_gbit_s or device.network_gbit_s)


def _budget(
    arguments: argparse.Namespace, candidate: Candidate, default: float | None
) -> Budget | None:
    tokens = _tokens(arguments) or default
    if arguments.size is not None and tokens is None:
        tokens = TOKENS_PER_PARAMETER * n_params(candidate.run.model)
    if tokens is None:
        return None
    return budget_of(
        candidate,
        tokens,
        gpu_hour_price=arguments.gpu_hour,
        kwh_price=arguments.kwh,
        device_mtbf_h=arguments.device_mtbf_h,
    )


def _tokens(arguments: argparse.Namespace) -> float | None:
    value = _flag(arguments.overrides, "train.tokens")
    return None if value is None else float(value)


def _flag(overrides: Sequence[Any], key: str) -> Any:
    values = [override.value for override in overrides if override.key == key]
    return values[-1] if values else None


def _judge(file: Path, readme: Path | None) -> int:
    """Print the planner's error against published runs, or write it into a README."""
    from fgpt.plan.published import read_published

    runs = read_published(file)
    from fgpt.plan import judge, judge_memory

    memory = judge_memory.render(judge_memory.judge_memory(runs)).strip()
    times = judge.render(judge.judge_times(runs)).strip()
    text = f"memory:\n\n{memory}\n\ntime of a step:\n\n{times}\n"
    if readme is None:
        print(text, end="")
        return 0
    try:
        before, opening, rest = readme.read_text(encoding="utf-8").partition(OPENING)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--readme {readme}: {error}") from error
    _, closing, after = rest.partition(CLOSING)
    if not closing:
        raise UserError(f"--readme {readme}: has no lines {OPENING} and {CLOSING}")
    _write_file(readme, f"{before}{opening}\n\n{text}\n{closing}{after}", "--readme")
    return 0


def _positive(text: str) -> float:
    """argparse type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e12:
        raise argparse.ArgumentTypeError(f"{text[:20]} is not a number above 0")
    return number


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt plan",
        description="Predict memory, time and cost of a run on a cluster, from shapes alone; no GPU"
        " is needed. Exit code 1: it does not fit.",
        examples=(
            "fgpt plan --ds_config ds_configs/zero1.json --model gpt2-xl --gpus 8 --gpu a100-80g",
            "fgpt plan --fit --model gpt3-175b --gpus 1024 --gpu a100-80g --tokens 300e9",
            "fgpt plan --for 70b --gpu h100-80g --days 30 --tokens 1.4e12",
            "fgpt plan --max_batch --ds_config ds_configs/zero3.json --model llama-8b --gpus 8"
            " --gpu h100-80g",
        ),
    )
    group = parser.add_argument_group("the machines")
    add = group.add_argument
    add("--gpus", type=counted, default=8, metavar="N", help="GPUs (default 8)")
    add("--gpu", metavar="NAME", help="their kind, such as h100-80g; a wrong one lists all")
    add("--nodes", type=counted, metavar="N", help="nodes (default: of the kind's usual size)")
    add("--gpus_per_node", type=counted, metavar="N", help="instead of --nodes")
    add("--network_gbit_s", type=_positive, metavar="X", help="of a node, each direction")
    add("--hardware", type=file_path, metavar="FILE", help="more kinds, as fgpt/plan/devices.json")
    group = parser.add_argument_group("what is asked")
    add = group.add_argument
    add("--fit", action="store_true", help="choose the layout: the fastest that fits")
    add("--max_batch", "--max-batch", action="store_true", help="the largest micro-batch that fits")
    add("--for", dest="size", metavar="SIZE", help="--fit of the preset of about this size: 70b")
    add("--cheapest", action="store_true", help="--fit with the number of GPUs that costs least")
    add("--days", type=_positive, metavar="D", help="with --fit: the fewest GPUs that take D days")
    add("--precision", choices=("bf16", "fp16"), default="bf16", help="of --fit (default bf16)")
    add("--no_offload", action="store_true", help="--fit keeps the optimizer on the GPUs")
    add("--published", type=file_path, metavar="FILE", help="judge the planner by published runs")
    add("--readme", type=file_path, metavar="FILE", help="write its tables into this file")
    group = parser.add_argument_group("cost")
    add = group.add_argument
    add("--gpu_hour", type=_positive, metavar="PRICE", help="of one GPU for an hour")
    add("--kwh", type=_positive, metavar="PRICE", help="of a kWh")
    add(
        "--device_mtbf_h",
        type=_positive,
        default=DEVICE_MTBF_H,
        metavar="H",
        help="hours between two failures of one GPU (default 50,700: Llama 3)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group.add_argument("--html", type=file_path, metavar="FILE", help="a page with plots")
    group.add_argument(
        "--write", type=file_path, metavar="DIR", help="with --fit: the files of its layout"
    )
    add_run_flags(parser, ds_config_required=False)
    return parser
