"""`fgpt bench recipe --coordinate-check` and `--rate-transfer`: they train, print and record."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from fgpt.bench import coordinates, rates, record
from fgpt.bench.recipe import Recipe
from fgpt.bench.width import WidthModel, about, width_models
from fgpt.cli.bench_recipe import plain_console, print_table
from fgpt.cli.bench_recipe_flags import FEW_STEPS, common_of, named_recipes
from fgpt.distributed.launch import device_kind
from fgpt.errors import TrainingError, UserError
from fgpt.report.coordinate_report import coordinate_table, parse_coordinates
from fgpt.report.rate_report import parse_rates, rate_table

COORDINATE_RECIPES, RATE_RECIPES = ("adamw", "muon"), ("adamw",)
COORDINATE_WIDTHS = (64, 128, 256, 512)
COORDINATE_STEPS = 6
COORDINATE_SEEDS = 3
RATE_WIDTHS = (128, 256, 512)
RATE_STEPS = 300


def bench_coordinates(args: argparse.Namespace) -> int:
    """Check each recipe's coordinates, print the slopes, append a JSON line each. Raises
    FgptError."""
    console, device, facts = _start(args)
    steps, seeds = args.steps or COORDINATE_STEPS, args.seeds or COORDINATE_SEEDS
    found = []
    for recipe in named_recipes(
        args.recipe or COORDINATE_RECIPES
    ):  # all errors of the configuration before the first is trained
        common = coordinates.at_constant_rate(common_of(args, [recipe], device))
        found.append((recipe, width_models(recipe, common, args.widths or COORDINATE_WIDTHS)))
    for recipe, models in found:
        traces, stopped = _traces(recipe, models, steps, seeds, args.minutes / len(found), console)
        means = [
            (model, coordinates.mean_over_seeds([each[i] for each in traces]))
            for i, model in enumerate(models)
        ]
        line = {
            **facts,
            "measurement": "coordinate_check",
            **about(recipe, models, rates.rates_of(recipe, models[0].common)),
            "steps": steps,
            "seeds": len(traces),
            "activations": coordinates.as_record(means),
        }
        print_table(coordinate_table(parse_coordinates(line)), console)
        _append(args, line, console, stopped)
    return 0


def _traces(
    recipe: Recipe,
    models: Sequence[WidthModel],
    steps: int,
    seeds: int,
    minutes: float,
    console: Console,
) -> tuple[list[list[dict[str, coordinates.Activation]]], BaseException | None]:
    """The activations of all models, for each seed that fits; and what stopped it after the first.

    Raises TrainingError.
    """
    start = time.perf_counter()
    traces: list[list[dict[str, coordinates.Activation]]] = []
    try:
        for seed in range(1, seeds + 1):
            spent = time.perf_counter() - start
            if traces and spent + spent / len(traces) > 60 * minutes:
                console.print(f"seeds that fit into --minutes: {len(traces)}, not {seeds}")
                break
            traces.append([coordinates.trace(recipe, m, steps, seed) for m in models])
            seconds = time.perf_counter() - start - spent
            console.print(f"{recipe.name}, seed {seed}: {seconds:.0f} s", style="dim")
    except (KeyboardInterrupt, TrainingError) as error:
        if not traces:
            _raise_unmeasured(error, "no seed was finished")
        return traces, error
    return traces, None


def bench_rates(args: argparse.Namespace) -> int:
    """Search the best rate of each width, print them, append a JSON line for each recipe. Raises
    FgptError."""
    console, device, facts = _start(args)
    low, high = args.powers or rates.POWERS
    if high - low < 2:
        raise UserError(f"--powers {low} {high}: a grid has three rates or more: write LOW HIGH")
    found = []
    for recipe in named_recipes(args.recipe or RATE_RECIPES):
        common = common_of(args, [recipe], device)
        found.append((recipe, width_models(recipe, common, args.widths or RATE_WIDTHS)))
    for recipe, models in found:
        minutes = args.minutes / len(found)
        line, stopped = _transfer(args, recipe, models, minutes, console)
        line = {**facts, "measurement": "rate_transfer", **line}
        print_table(rate_table(parse_rates(line)), console)
        _append(args, line, console, stopped)
    return 0


def _transfer(
    args: argparse.Namespace,
    recipe: Recipe,
    models: Sequence[WidthModel],
    minutes: float,
    console: Console,
) -> tuple[dict[str, Any], BaseException | None]:
    """A recipe's record, and the interrupt that stopped it. Raises FgptError."""
    of_recipe, seeds = rates.rates_of(recipe, models[0].common), args.seeds or 1
    low, high = args.powers or rates.POWERS
    powers = range(low, high + 1)
    n_runs = (len(powers) + 1) * seeds  # the best rate of some is at the grid's end
    steps = _steps(recipe, models, n_runs, 60 * minutes, args.steps or RATE_STEPS, console)
    for power in powers:  # ConfigError before the first is trained
        for model in models:
            rates.at_power(model.common, of_recipe, power).resolved(recipe, steps, seed=1)
    curves, stopped = _curves(recipe, models, of_recipe, powers, steps, seeds, console)
    try:
        kept = rates.as_record(curves)
    except UserError as error:
        _raise_unmeasured(stopped, str(error).removeprefix("nothing is recorded: "))
        raise
    about_runs = about(recipe, models, of_recipe)
    return {**about_runs, "steps": steps, "seeds": seeds, "curves": kept}, stopped


def _steps(
    recipe: Recipe,
    models: Sequence[WidthModel],
    n_runs: int,
    seconds: float,
    most: int,
    console: Console,
) -> int:
    """The steps of each run."""
    start = time.perf_counter()
    fitting = rates.fitting_steps(recipe, models, n_runs, seconds)
    fitting -= int(fitting * (time.perf_counter() - start) / seconds)
    steps = min(most, max(fitting, 1))
    console.print(f"{recipe.name}: {steps} steps with each rate", style="dim")
    if steps < FEW_STEPS:
        console.print(
            f"warning: {steps} steps hardly leave the warm-up, where the best rate is another one:"
            " raise --minutes, or lower --global_batch or --seq_len"
        )
    return steps


def _curves(
    recipe: Recipe,
    models: Sequence[WidthModel],
    of_recipe: Mapping[str, float],
    powers: Sequence[int],
    steps: int,
    seeds: int,
    console: Console,
) -> tuple[list[rates.RateCurve], BaseException | None]:
    """The whole curves, and the interrupt that stopped them."""
    curves: list[rates.RateCurve] = []

    def tell(curve: rates.RateCurve, power: int) -> None:
        kind = "muP" if curve.mup else "no muP"
        console.print(
            f"{recipe.name}, width {curve.d_model}, {kind}, rates x {2.0**power:g}: validation loss"
            f" {curve.losses[power]:.3f}",
            style="dim",
        )

    try:
        for model in models:
            grid = sorted(curves[0].losses) if curves else powers  # as far as the base's
            curves.append(rates.train(recipe, model, of_recipe, grid, steps, seeds, tell))
    except KeyboardInterrupt as error:
        return curves, error
    return curves, None


def _start(args: argparse.Namespace) -> tuple[Console, torch.device, dict[str, Any]]:
    record.must_be_writable(args.out)
    device = torch.device(device_kind())
    return plain_console(), device, record.environment(device)


def _raise_unmeasured(stopped: BaseException | None, why: str) -> None:
    """Say that an interrupt left nothing; raise another error as it is."""
    if isinstance(stopped, KeyboardInterrupt):
        raise UserError(f"interrupted: nothing is recorded: {why}") from stopped
    if stopped is not None:
        raise stopped


def _append(
    args: argparse.Namespace, line: dict[str, Any], console: Console, stopped: BaseException | None
) -> None:
    """Append the record; then raise what stopped its measurement."""
    record.append(args.out, line)
    console.print(f"record: {args.out}; table and plot: fgpt report")
    if stopped is not None:
        raise stopped
