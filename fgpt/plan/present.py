"""Plans as tables of a terminal and as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fgpt.model.count import n_params
from fgpt.plan.budget import Budget
from fgpt.plan.search import Candidate

GIB = 2**30


def describe(candidate: Candidate) -> str:
    """Return a layout in one line: the grid, ZeRO, the batch, and what else it chooses."""
    run = candidate.run
    words = [f"tp {run.tp}", f"pp {run.pp}", f"dp {run.dp}"]
    words += [f"cp {run.cp}"] if run.cp > 1 else []
    words += [f"ZeRO-{run.zero_stage}", f"micro-batch {run.micro}, {run.accumulation} a step"]
    words += ["sequence parallel"] if run.sequence else []
    words += [f"recompute {run.recompute}"] if run.recompute != "none" else []
    words += ["optimizer on the host"] if run.offloads_optimizer else []
    return ", ".join(words)


def heading_lines(candidate: Candidate) -> list[str]:
    """The model and its batch, the cluster, and the layout."""
    run, cluster = candidate.run, candidate.cluster
    network = f", {cluster.network_gbit_s:,.0f} Gbit/s a node" if cluster.nodes > 1 else ""
    return [
        f"{run.model.preset}: {n_params(run.model) / 1e9:,.3g}B parameters,"
        f" {run.global_batch:,} samples of {run.seq_len:,} tokens a step, {run.precision}",
        f"{cluster.gpus:,} x {cluster.device.name}, {cluster.gpus_per_node} a node{network}",
        describe(candidate),
    ]


def render_plan(candidate: Candidate, budget: Budget | None, console: Console) -> None:
    """Print the memory and the time of a plan by term, its speed, and its budget."""
    for line in heading_lines(candidate):
        _print(line, console)
    terms = candidate.memory.terms()
    _print_terms("memory of the rank that needs most", "GiB", terms, console)
    _print(fit_line(candidate), console)
    _print_terms("time of a step", "s", candidate.time.terms(), console)
    for line in speed_lines(candidate) + (
        [] if budget is None else budget_lines(candidate, budget)
    ):
        _print(line, console)


def fit_line(candidate: Candidate) -> str:
    """Whether it fits, and by how much."""
    memory, margin = candidate.memory, candidate.margin_gib
    needed = f"{memory.device_total / GIB:,.1f} GiB with context and fragmentation"
    if candidate.host_margin_gib < 0:
        host_gib = candidate.cluster.device.host_gib_per_node
        return (
            f"does not fit: what is offloaded needs {-candidate.host_margin_gib:,.0f} GiB more than"
            f" the {host_gib:,.0f} GiB of host memory of a node"
        )
    available = f"{candidate.cluster.device.memory_gib:,.1f} GiB of {candidate.cluster.device.name}"
    if margin >= 0:
        return f"fits: {needed} of the {available}, {margin:,.1f} GiB to spare"
    return f"does not fit: {needed}, {-margin:,.1f} GiB more than the {available}"


def speed_lines(candidate: Candidate) -> list[str]:
    """Tokens per second and utilization, with the interval."""
    time, run = candidate.time, candidate.run
    fastest_s, slowest_s = time.interval
    low, high = run.tokens_per_step / slowest_s, run.tokens_per_step / fastest_s
    lines = [
        f"step: {time.total:,.3g} s ({fastest_s:,.3g} to {slowest_s:,.3g});"
        f" {candidate.tokens_s:,.0f} tokens/s ({low:,.0f} to {high:,.0f}),"
        f" {candidate.tokens_s / run.ranks:,.0f} of a GPU",
        f"MFU {time.mfu:.1%} (model FLOPs, attention in full)",
    ]
    if run.recompute != "none":
        lines[-1] += f", HFU {time.hfu:.1%} (with recomputation)"
    return lines


def budget_lines(candidate: Candidate, budget: Budget) -> list[str]:
    """Days, energy and money of a run."""
    useful, gpu_hours = budget.goodput, budget.days * 24 * candidate.cluster.gpus
    lines = [
        f"{budget.tokens:,.3g} tokens: {budget.days:,.1f} days, {gpu_hours:,.0f} GPU hours,"
        f" {budget.kwh:,.0f} kWh" + ("" if budget.money is None else f", {budget.money:,.0f} paid"),
        f"failures: {useful.failures_per_day:,.2g} a day; a checkpoint every"
        f" {useful.interval_s / 60:,.1f} min; goodput {useful.goodput:.1%}",
    ]
    return lines


def candidate_cells(candidate: Candidate) -> dict[str, str]:
    """Column -> cell of a candidate's row."""
    run, time = candidate.run, candidate.time
    return {
        "tp": str(run.tp),
        "pp": str(run.pp),
        "cp": str(run.cp),
        "dp": str(run.dp),
        "ZeRO": str(run.zero_stage),
        "micro": str(run.micro),
        "accumulation": str(run.accumulation),
        "recompute": run.recompute,
        "offload": "optimizer" if run.offloads_optimizer else "none",
        "GiB": f"{candidate.memory.device_total / GIB:.1f}",
        "step s": f"{time.total:.4g}",
        "tokens/s/GPU": f"{candidate.tokens_s / run.ranks:,.0f}",
        "MFU": f"{time.mfu:.1%}",
    }


def render_candidates(candidates: Sequence[Candidate], console: Console) -> None:
    """Print a table of layouts, in the order given."""
    table = Table(box=None, pad_edge=False)
    for column in candidate_cells(candidates[0]) if candidates else ():
        table.add_column(column, justify="right", no_wrap=True)
    for candidate in candidates:
        table.add_row(*candidate_cells(candidate).values())
    console.print(table)


def as_json(candidate: Candidate, budget: Budget | None) -> dict[str, Any]:
    """Return a plan as JSON values: bytes, seconds."""
    run, cluster, time = candidate.run, candidate.cluster, candidate.time
    return {
        "run": asdict(run),
        "cluster": asdict(cluster),
        "memory_bytes": candidate.memory.terms() | {"device_total": candidate.memory.device_total},
        "fits": candidate.fits,
        "margin_gib": candidate.margin_gib,
        "step_s": time.terms()
        | {"total": time.total, "low": time.interval[0], "high": time.interval[1]},
        "tokens_per_s": candidate.tokens_s,
        "mfu": time.mfu,
        "hfu": time.hfu,
        "budget": None if budget is None else asdict(budget),
    }


def _print_terms(title: str, unit: str, terms: Mapping[str, float], console: Console) -> None:
    """Print the terms that are not 0, with their shares."""
    scale = GIB if unit == "GiB" else 1
    total = sum(terms.values())
    console.print()
    _print(f"{title}:", console)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in (unit, "share"):
        table.add_column(column, justify="right")
    for name, value in terms.items():
        if value > 0:
            share = f"{value / total:.1%}"
            table.add_row(name.replace("_", " "), f"{value / scale:,.4g}", share)
    console.print(table)


def _print(line: str, console: Console) -> None:
    console.print(Text(line), soft_wrap=True)
