"""`fgpt bench recipe --ladder`: trains the ladder, and prints its law."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from fgpt.bench import ladder, record
from fgpt.cli.bench_recipe import plain_console, print_table
from fgpt.cli.bench_recipe_flags import FEW_STEPS, common_of, named_recipes
from fgpt.distributed.launch import device_kind
from fgpt.errors import TrainingError, UserError
from fgpt.report.ladder_report import ladder_table, parse_ladder

if TYPE_CHECKING:
    from fgpt.bench.recipe import Recipe

DEFAULT_RECIPE = "muon"
SHARE_OF_TRAINING = 0.93
"""Of --minutes; the rest builds engines, measures steps and evaluates."""
MANY_EPOCHS = 4
"""Repeated data is worth less from there on (Muennighoff et al. 2023)."""


def bench_ladder(args: argparse.Namespace) -> int:
    """Train the ladder, print its law, append a JSON line. Raises FgptError."""
    start = time.perf_counter()
    recipe = _only_recipe(args)
    record.must_be_writable(args.out)
    console = plain_console()
    device = torch.device(device_kind())
    facts = record.environment(device)
    common = common_of(args, [recipe], device)
    resolved = common.resolved(recipe, steps=1, seed=1)
    ladder.check_widths(resolved.run.model)
    sizes = ladder.measured_sizes(recipe, common)
    seconds = 60 * args.minutes * SHARE_OF_TRAINING - (time.perf_counter() - start)
    runs = ladder.plan(sizes, max(seconds, 1.0), args.steps)
    ladder.check_plan(runs)
    for planned in runs:  # ConfigError before the first is trained
        planned.size.common.resolved(recipe, planned.steps, seed=1)
    if (shortest := min(planned.steps for planned in runs)) < FEW_STEPS:
        console.print(
            f"warning: the shortest run has {shortest} steps; a law needs runs of {FEW_STEPS} or"
            " more: raise --minutes"
        )
    points, diverged, interrupt = _train(recipe, runs, console)
    found = _conclude(points, interrupt)
    line = {
        **facts,
        "measurement": "ladder",
        "row": args.model,
        "recipe": recipe.name,
        "precision": resolved.precision,
        "data": str(common.run["data.path"]),
        "seq_len": resolved.seq_len,
        "global_batch": resolved.batch.global_size,
        "diverged": diverged,
        **ladder.as_record(found),
    }
    print_table(ladder_table(parse_ladder(dict(line))), console)
    _warn_of_repeats(points, console)
    record.append(args.out, line)
    console.print(f"record: {args.out}; table and plot: fgpt report")
    if interrupt is not None:
        raise interrupt
    return 0


def _only_recipe(args: argparse.Namespace) -> Recipe:
    """Raises UserError for several recipes or seeds."""
    recipes = named_recipes(args.recipe or [DEFAULT_RECIPE])
    if len(recipes) > 1:
        names = ", ".join(recipe.name for recipe in recipes)
        raise UserError(f"--ladder --recipe {names}: a ladder is of one recipe: name one")
    if args.seeds is not None:
        raise UserError(
            f"--ladder --seeds {args.seeds}: a ladder trains each size and compute once: leave"
            " --seeds out"
        )
    return recipes[0]


def _train(
    recipe: Recipe, runs: Sequence[ladder.PlannedRun], console: Console
) -> tuple[list[ladder.LadderPoint], list[str], KeyboardInterrupt | None]:
    """The points of the runs, and the names of those that diverged, until one is interrupted."""
    points: list[ladder.LadderPoint] = []
    diverged: list[str] = []
    try:
        for planned, result in zip(runs, ladder.train(recipe, runs), strict=True):
            name = f"{planned.size.name}, {planned.steps} steps"
            if isinstance(result, TrainingError):
                diverged.append(name)
                console.print(f"warning: {name} diverged and is left out: {result}")
                continue
            points.append(result)
            console.print(
                f"{name}, {result.tokens:,} tokens: validation loss {result.loss:.3f},"
                f" {result.seconds:.0f} s",
                style="dim",
            )
    except KeyboardInterrupt as error:
        return points, diverged, error
    return points, diverged, None


def _conclude(
    points: Sequence[ladder.LadderPoint], interrupt: KeyboardInterrupt | None
) -> ladder.Ladder:
    """Raises UserError if the points are too few; for an interrupted ladder it says so."""
    try:
        return ladder.conclude(points)
    except UserError as error:
        when = "interrupted" if interrupt else "finished"
        raise UserError(f"{len(points)} runs {when}: nothing is recorded: {error}") from error


def _warn_of_repeats(points: Sequence[ladder.LadderPoint], console: Console) -> None:
    most = max(point.epochs for point in points)
    if most > MANY_EPOCHS:
        console.print(
            f"warning: a run read its data {most:.1f} times; more than {MANY_EPOCHS} times is worth"
            " less than new tokens: name larger --data"
        )
