"""The flags of `fgpt bench recipe` in all of its modes, and what they all read: recipes, data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import counted
from fgpt.config.presets import PRESETS
from fgpt.errors import UserError

if TYPE_CHECKING:
    from fgpt.bench.recipe import Common, Recipe
    from fgpt.data.token_dataset import BlendedDataset

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
BUILT_IN: Mapping[str, tuple[str, str | None]] = {
    "adamw": ("bf16.json", None),
    "nanogpt": ("bench/recipe_nanogpt.json", None),
    "muon": ("muon.json", None),
}
"""Name -> DeepSpeed JSON and run file in ds_configs; the first is the one to beat."""
STEPS = 600
FEW_STEPS = 60
"""Shorter runs hardly leave their warm-up."""
BATCH, SMALL_BATCH = 16, 4
"""Samples of a step. The short runs of the other modes need more and smaller steps."""


def recipe_parser() -> argparse.ArgumentParser:
    """The parser of `fgpt bench recipe`."""
    parser = ArgumentParser(
        prog="fgpt bench recipe",
        description="Train recipes side by side: the same model, initial weights and samples."
        " Prints each one's validation loss, and the tokens and seconds that it takes to the loss"
        " with which the first one ends, as shares of what that takes.",
        examples=[
            "fgpt bench recipe --minutes 5",
            "fgpt bench recipe --recipe adamw --recipe mine=my_own.json --seeds 1",
            "fgpt bench recipe --ladder --recipe mine=my_own.json --minutes 20",
            "fgpt bench recipe --coordinate-check --precision fp32",
            "fgpt bench recipe --rate-transfer --recipe adamw --widths 128 512 --minutes 30",
        ],
    )
    add = parser.add_argument
    _add_modes(parser)
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
    steps = f"default: {STEPS}; of a ladder: of its longest run, at most (default: what fits);"
    steps += " of --coordinate-check 6, of --rate-transfer at most 300"
    add("--steps", type=counted, metavar="N", help=steps)
    add(
        "--seeds",
        type=counted,
        metavar="N",
        help="default: 1, of --coordinate-check 3; a ladder has one",
    )
    add("--minutes", type=_minutes, default=10.0, metavar="M", help="fewer steps fit (default: 10)")
    batch = "samples (default: 16; of the other modes 4)"
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


def _add_modes(parser: argparse.ArgumentParser) -> None:
    """What is measured instead of recipes side by side."""
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--ladder",
        action="store_true",
        help="instead train one recipe (default: muon) at five widths, an eighth to half of the"
        " preset's, each for three computes, fit the law of their losses, and predict the widest,"
        " which is left out",
    )
    instead.add_argument(
        "--coordinate-check",
        action="store_true",
        help="instead train each recipe (default: adamw and muon) at several widths, with muP and"
        " without, for a few steps at its constant rate, and show how the change of the activations"
        " depends on the width",
    )
    instead.add_argument(
        "--rate-transfer",
        action="store_true",
        help="instead train each recipe (default: adamw) at several widths, with muP and"
        " without, with learning rates a factor of 2 apart, and show how far the best one moves",
    )
    add = parser.add_argument
    add(
        "--widths",
        type=counted,
        nargs="+",
        metavar="D",
        help="d_model of both; muP's base is the narrowest (default: 64 128 256 512; of"
        " --rate-transfer 128 256 512)",
    )
    add(
        "--powers",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="--rate-transfer multiplies the recipe's rates by 2^LOW to 2^HIGH (default: -1 4)",
    )


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return value


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
    has_short_runs = args.ladder or args.coordinate_check or args.rate_transfer
    samples = args.global_batch or (SMALL_BATCH if has_short_runs else BATCH)
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
