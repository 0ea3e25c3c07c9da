"""`fgpt bench recipe`: flags, and the table that it prints."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import counted
from fgpt.config.presets import PRESETS
from fgpt.errors import TrainingError, UserError

if TYPE_CHECKING:
    from fgpt.bench.recipe import Common, Curve, Recipe
    from fgpt.data.token_dataset import BlendedDataset

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
BUILT_IN: Mapping[str, tuple[str, str | None]] = {
    "adamw": ("bf16.json", None),
    "nanogpt": ("bench/recipe_nanogpt.json", None),
    "muon": ("muon.json", None),
}
"""Name -> DeepSpeed JSON and run file in ds_configs; the first is the one to beat."""
STEPS = 600
BATCH, LADDER_BATCH = 16, 4
"""Samples of a step. A ladder's short runs need more and smaller steps."""
MOST_STEPS_OF_EVALUATION = 0.15
"""Share of the time that evaluations take, at most."""


def bench_recipe_verb(argv: Sequence[str]) -> int:
    """Train recipes side by side, print a table, append a JSON line. Raises FgptError."""
    args = _parser().parse_args(argv)
    if args.ladder:
        from fgpt.cli.bench_ladder import bench_ladder

        return bench_ladder(args)
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


def named_recipes(named: Sequence[str]) -> list[Recipe]:
    """The recipes of --recipe; all built-in ones without it. Raises UserError."""
    from fgpt.bench.recipe import Recipe

    recipes = []
    for text in named or BUILT_IN:
        name, _, files = text.partition("=")
        if not files and name in BUILT_IN:
            ds, run = BUILT_IN[name]
            recipes.append(Recipe(name, CONFIGS / ds, CONFIGS / run if run else None))
            continue
        ds, _, run = files.partition(",")
        if not name or not ds:
            raise UserError(
                f"--recipe {text}: write one of {', '.join(BUILT_IN)}, or NAME=DEEPSPEED_JSON or"
                " NAME=DEEPSPEED_JSON,RUN_FILE"
            )
        recipes.append(Recipe(name, Path(ds).expanduser(), Path(run).expanduser() if run else None))
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise UserError(f"--recipe: two recipes have the same name: {', '.join(names)}")
    return recipes


def common_of(args: argparse.Namespace, recipes: Sequence[Recipe], device: Any) -> Common:
    """What all recipes have in common; opens the data. Raises ConfigError, DataError, UserError."""
    from fgpt.bench.recipe import Common, check_comparable, resolve_recipe
    from fgpt.config.schema import DataConfig
    from fgpt.data.token_dataset import open_blended_dataset
    from fgpt.prepare.pipeline import ensure_prepared

    path = str(args.data or DataConfig().path)
    run: dict[str, Any] = {
        "model.preset": args.model,
        "data.path": path,
        "data.seq_len": args.seq_len,
        "train.steps": args.steps or STEPS,
        "speed.compile": "off",
    }
    samples = args.global_batch or (LADDER_BATCH if args.ladder else BATCH)
    batch = {"train_batch_size": samples, "train_micro_batch_size_per_gpu": None}
    deepspeed: dict[str, Any] = {**batch, "gradient_accumulation_steps": None}
    if args.precision:
        deepspeed["bf16"] = {"enabled": args.precision == "bf16"}
        deepspeed["data_types"] = None
    # before data are prepared, and before any is trained
    check_comparable(
        [resolve_recipe(recipe, run, deepspeed, device) for recipe in recipes], recipes
    )
    if args.data is None:
        ensure_prepared(path, DataConfig().recipe)
    data: BlendedDataset = open_blended_dataset(path)
    run["model.vocab_size"] = data.tokenizer.vocab_size
    return Common(run, deepspeed, data, device)


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


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="fgpt bench recipe",
        description="Train recipes side by side: the same model, initial weights and samples."
        " Prints each one's validation loss, and the tokens and seconds that it takes to the loss"
        " with which the first one ends, as shares of what that takes.",
        examples=[
            "fgpt bench recipe --minutes 5",
            "fgpt bench recipe --recipe adamw --recipe mine=my_own.json --seeds 1",
            "fgpt bench recipe --ladder --recipe mine=my_own.json --minutes 20",
        ],
    )
    add = parser.add_argument
    add(
        "--ladder",
        action="store_true",
        help="instead train one recipe (default: muon) at five widths, an eighth to half of the"
        " preset's, each for three computes, fit the law of their losses, and predict the widest,"
        " which is left out",
    )
    add("--model", choices=sorted(PRESETS), default="tiny", metavar="PRESET", help="default: tiny")
    add(
        "--recipe",
        action="append",
        default=[],
        metavar="NAME[=DS_JSON[,RUN_FILE]]",
        help=f"a DeepSpeed JSON and a run file; built in: {', '.join(BUILT_IN)} (default: these)",
    )
    what = "prepared data (default: this Python's sources)"
    add("--data", type=file_path, metavar="DIR", help=what)
    steps = f"default: {STEPS}; of a ladder: of its longest run, at most (default: what fits)"
    add("--steps", type=counted, metavar="N", help=steps)
    add("--seeds", type=counted, metavar="N", help="default: 1; a ladder has one")
    add("--minutes", type=_minutes, default=10.0, metavar="M", help="fewer steps fit (default: 10)")
    batch = "samples (default: 16; of a ladder 4)"
    add("--global_batch", type=counted, metavar="N", help=batch)
    add("--seq_len", type=counted, default=256, metavar="N", help="tokens (default: 256)")
    add("--precision", choices=("fp32", "bf16"), help="of all recipes (default: each JSON's)")
    add(
        "--out",
        type=file_path,
        default=Path("runs/bench/recipe.jsonl"),
        metavar="FILE",
        help="records are appended here (default: runs/bench/recipe.jsonl)",
    )
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return value
