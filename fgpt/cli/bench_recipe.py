"""`fgpt bench recipe`, and the table that it prints."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fgpt.cli.bench_recipe_flags import STEPS, common_of, named_recipes, recipe_parser
from fgpt.errors import TrainingError

if TYPE_CHECKING:
    from fgpt.bench.recipe import Common, Curve, Recipe
    from fgpt.report.tables import Table as ReportTable

MOST_STEPS_OF_EVALUATION = 0.15
"""Share of the time that evaluations take, at most."""


def bench_recipe_verb(argv: Sequence[str]) -> int:
    """Train recipes side by side, print a table, append a JSON line. Raises FgptError."""
    parser = recipe_parser()
    args = parser.parse_args(argv)
    if args.widths and not (args.coordinate_check or args.rate_transfer):
        parser.error("--widths is for --coordinate-check and --rate-transfer")
    if args.powers and not args.rate_transfer:
        parser.error("--powers is for --rate-transfer")
    if args.ladder:
        from fgpt.cli.bench_ladder import bench_ladder

        return bench_ladder(args)
    if args.coordinate_check or args.rate_transfer:
        from fgpt.cli.bench_width import bench_coordinates, bench_rates

        return bench_coordinates(args) if args.coordinate_check else bench_rates(args)
    import torch

    from fgpt.bench import record
    from fgpt.bench.recipe import step_seconds, summary
    from fgpt.distributed.launch import device_kind

    record.must_be_writable(args.out)
    console = plain_console()
    most_steps, seeds = args.steps or STEPS, args.seeds or 1
    recipes = named_recipes(args.recipe)
    device = torch.device(device_kind())
    facts = record.environment(device)
    common = common_of(args, recipes, device)
    # the steps that fit into the time: evaluations take some of it
    per_step = step_seconds(recipes, common)
    fitting = int(60 * args.minutes * (1 - MOST_STEPS_OF_EVALUATION) / (per_step * seeds))
    steps = min(most_steps, max(fitting, 1))
    if steps < most_steps:
        console.print(
            f"{steps} steps fit into --minutes {args.minutes:g}, not {most_steps}: schedules and"
            " losses are those of a shorter run"
        )
    curves: list[Curve] = []
    stopped: BaseException | None = None
    try:
        for seed in range(1, seeds + 1):
            curves += _one_seed(recipes, common, steps, seed, console)
    except (KeyboardInterrupt, TrainingError) as error:
        if not curves:
            raise
        stopped = error  # after the record of the seeds before
    precisions = (common.resolved(recipe, steps, 1).precision for recipe in recipes)
    about = {
        "row": args.model,
        "precision": " and ".join(dict.fromkeys(precisions)),
        "steps": steps,
        "tokens": curves[0].points[-1].tokens,
        "seeds": len({curve.seed for curve in curves}),
        "baseline": recipes[0].name,
        "data": str(common.run["data.path"]),
    }
    found = summary(curves, recipes[0].name)
    console.print(_table(about, found))
    lines = [{"recipe": c.recipe.name, "seed": c.seed, "points": c.points} for c in curves]
    record.append(
        args.out, {**facts, "measurement": "recipe", **about, "values": found, "curves": lines}
    )
    console.print(f"record: {args.out}; tables and plots: fgpt report")
    if stopped is not None:
        raise stopped
    return 0


def _one_seed(
    recipes: Sequence[Recipe], common: Common, steps: int, seed: int, console: Console
) -> list[Curve]:
    """Train the recipes with one seed, and print how they do. Raises TrainingError."""
    from fgpt.bench.recipe import check_baseline, measure

    start = time.perf_counter()
    for so_far in measure(recipes, common, steps=steps, seed=seed):
        last = so_far[0].points[-1]
        losses = ", ".join(f"{c.recipe.name} {c.points[-1].loss:.3f}" for c in so_far)
        console.print(f"seed {seed}  {last.tokens:,} tokens  {losses}", style="dim")
    console.print(f"seed {seed}: {time.perf_counter() - start:.0f} s", style="dim")
    check_baseline(so_far[0])
    return so_far


def plain_console() -> Console:
    """A console that prints names as they are."""
    return Console(width=None if os.isatty(1) else 110, highlight=False, markup=False)


def print_table(shown: ReportTable, console: Console) -> None:
    """Print a table and notes of the report."""
    table = Table(title=shown.title, title_justify="left", box=None, pad_edge=False)
    for i, heading in enumerate(shown.headers):
        table.add_column(heading, justify="left" if i in shown.text_columns else "right")
    for row in shown.rows:
        table.add_row(*row.cells)
    console.print(table)
    for note in shown.notes:
        console.print(note)


def _table(about: dict[str, Any], found: dict[str, dict[str, list[float] | None]]) -> Table:
    title = "{row}, {precision}, {steps} steps, {tokens:,} tokens, seeds: {seeds}".format(**about)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    baseline = about["baseline"]
    for heading in (
        "recipe",
        "validation loss",
        "time of a step",
        f"tokens to {baseline}'s loss",
        "seconds to it",
    ):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for name, values in found.items():
        cells = [_cell(values["loss"], ".3f", ""), _cell(values["step_time"], ".2f", " x")]
        cells += [_cell(values[kind], ".2f", " x") for kind in ("tokens", "seconds")]
        table.add_row(name, *cells)
    return table


def _cell(three: list[float] | None, form: str, unit: str) -> str:
    if three is None:
        return "never"
    median, low, high = (f"{value:{form}}" for value in three)
    return f"{median}{unit}" if low == high else f"{median}{unit} ({low}-{high})"
