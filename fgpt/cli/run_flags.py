"""The flags that launchers/train.py and `fgpt check` share, and their RunRequest."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from fgpt.cli.arguments import ArgumentParser, file_path, nonempty, warn_given_twice
from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO
from fgpt.config.derive import Dialect
from fgpt.config.resolve import RunRequest
from fgpt.config.run_file import Override
from fgpt.config.schema import RunConfig, SavedModel
from fgpt.errors import CheckpointError, ConfigError, UserError
from fgpt.utils.strict_json import parse


class _SetFlag(argparse.Action):
    """Appends an Override, so that the overrides keep the order of the flags."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        flag = option_string or self.option_strings[0]
        key = {**_FLAGS, **_DEEPSPEED_FLAGS}.get(flag.replace("-", "_").replace("__", "--", 1))
        name = flag
        if key is None:
            key, equals, text = values.partition("=")
            if not key or not equals:
                example = "train.steps=100" if flag == "--set" else "gradient_clipping=1.0"
                parser.error(f"{flag} {values}: write KEY=VALUE, as in {flag} {example}")
            name, values = f"{flag} {key}", _value(text)
        earlier = getattr(namespace, self.dest) or ()
        same_key = [override.value for override in earlier if override.key == key]
        if same_key and same_key[-1] != values:
            warn_given_twice(name, values)
        setattr(namespace, self.dest, (*earlier, Override(key, values, flag)))


_FLAGS: Mapping[str, str] = {
    "--model": "model.preset",
    "--data": "data.path",
    "--steps": "train.steps",
    "--tokens": "train.tokens",
    "--epochs": "train.epochs",
    "--seed": "train.seed",
    "--run_dir": "run_dir",
    "--init_from": "train.init_from",
    "--tp": "parallel.tp",
    "--pp": "parallel.pp",
    "--cp": "parallel.cp",
    "--sequence": "parallel.sequence",
}


_DEEPSPEED_FLAGS: Mapping[str, str] = {
    "--lr": "optimizer.params.lr",
    "--micro_batch": MICRO,
    "--accumulation": ACCUMULATION,
    "--global_batch": GLOBAL,
}
"""Flags that set a key of the DeepSpeed JSON."""


def add_run_flags(parser: argparse.ArgumentParser, *, ds_config_required: bool = True) -> None:
    """Add the flags of a run. `request_of` reads them."""
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--ds_config",
        "--ds-config",
        "--deepspeed_config",  # DeepSpeed's own name for it
        "--deepspeed-config",
        required=ds_config_required,
        type=file_path,
        metavar="FILE",
        help="DeepSpeed JSON: batch, precision, ZeRO, optimizer, schedule",
    )
    group.add_argument(
        "--run_file",
        "--run-file",
        "--run",  # torchrun takes it for its own --run-path
        dest="run",
        type=file_path,
        metavar="FILE",
        help="run file (JSON): model, data, steps, ...",
    )

    def add(*names: str, **options: Any) -> None:
        group.add_argument(*names, action=_SetFlag, dest="overrides", default=(), **options)

    add("--model", metavar="PRESET", type=nonempty, help="model preset (model.preset)")
    add(
        "--data",
        metavar="DIR",
        type=nonempty,
        help="prepared data (data.path); a mixture: DIR:0.7,DIR:0.3",
    )
    add("--steps", metavar="N", type=int, help="optimizer steps (train.steps)")
    add("--tokens", metavar="N", type=float, help="training tokens instead (train.tokens)")
    add("--epochs", metavar="N", type=float, help="passes over the data instead (train.epochs)")
    add("--seed", metavar="N", type=int, help="seed of weights and dropout (train.seed)")
    add(
        "--run_dir",
        "--run-dir",
        metavar="DIR",
        type=nonempty,
        help="directory of the run's output (run_dir)",
    )
    add(
        "--init_from",
        "--init-from",
        metavar="PATH",
        type=nonempty,
        help="start from the weights of a run, a checkpoint or a directory of Hugging Face, whose"
        " model is the default (train.init_from)",
    )
    add("--tp", metavar="N", type=int, help="tensor-parallel ranks (parallel.tp)")
    add("--pp", metavar="N", type=int, help="pipeline stages (parallel.pp)")
    add("--cp", metavar="N", type=int, help="context-parallel ranks (parallel.cp)")
    add(
        "--sequence",
        metavar="true|false",
        nargs="?",
        const=True,
        type=_value,
        help="sequence parallelism with tp (parallel.sequence); without a value: true",
    )
    add("--set", metavar="KEY=VALUE", help="any run-file field; VALUE is JSON or a string")

    group = parser.add_argument_group("instead of the DeepSpeed JSON's values")

    def add_deepspeed(*names: str, **options: Any) -> None:
        options.setdefault("metavar", "N")
        group.add_argument(*names, action=_SetFlag, dest="deepspeed_flags", default=(), **options)

    add_deepspeed("--lr", type=_positive, help="learning rate (optimizer.params.lr)")
    add_deepspeed("--micro_batch", "--micro-batch", type=counted, help=f"samples ({MICRO})")
    add_deepspeed("--accumulation", type=counted, help=f"micro-batches per step ({ACCUMULATION})")
    add_deepspeed("--global_batch", "--global-batch", type=counted, help=f"samples ({GLOBAL})")
    ds_set = "any key of the JSON; VALUE is JSON, null removes the key"
    add_deepspeed("--ds_set", "--ds-set", metavar="KEY=VALUE", help=ds_set)
    group.add_argument(
        "--auto",
        choices=get_args(Dialect),
        default="fgpt",
        help="whose values \"auto\" and absent keys take: FGPT's, or hf, Hugging Face's Trainer's",
    )


def with_home(argv: Sequence[str]) -> list[str]:
    """Expand ~ behind the equals sign of a flag (--out=~/x), where shells leave it."""
    split = [argument.partition("=") for argument in argv]
    return [
        flag + equals + os.path.expanduser(value) if flag.startswith("--") and equals else argument
        for argument, (flag, equals, value) in zip(argv, split, strict=True)
    ]


def request_of(args: argparse.Namespace) -> RunRequest:
    """Return the RunRequest of parsed flags."""
    return RunRequest(
        args.ds_config,
        args.run,
        tuple(args.overrides),
        deepspeed_flags=tuple(args.deepspeed_flags),
        auto=args.auto,
        tokens_of=_training_tokens,
        saved_model=partial(_saved_model, resume=getattr(args, "resume", None) or "none"),
    )


def separate_steps(request: RunRequest, default: int) -> tuple[RunRequest, int]:
    """Return the request without --steps, and the steps: those of a comparison, which cuts the run
    but leaves its schedule as it is. Raises UserError.
    """
    flags = [override for override in request.overrides if override.flag == "--steps"]
    others = tuple(override for override in request.overrides if override.flag != "--steps")
    steps = flags[-1].value if flags else default
    if steps < 1:
        raise UserError(f"--steps {steps}: must be at least 1")
    return replace(request, overrides=others), steps


def _training_tokens(path: str) -> int | None:
    """Tokens of the training split of a prepared data set; None if it is not prepared."""
    from fgpt.data.card import load_card
    from fgpt.errors import DataError

    try:
        return load_card(Path(path)).splits["train"].tokens
    except DataError:
        return None


def _saved_model(run: RunConfig, *, resume: str) -> SavedModel:
    """The model of the checkpoint that the run resumes from, as its first weights may be gone by
    then; else that of train.init_from. Raises CheckpointError.
    """
    from fgpt.inference.weights import data_path, model_of_newest, open_weights  # imports torch

    # 1. the checkpoint; a run directory by default has the name of the model, unknown until 2.
    resumed = {"none": None, "auto": run.run_dir}.get(resume, resume)
    if resumed is not None and (saved := model_of_newest(Path(resumed))) is not None:
        return saved
    # 2. the weights
    path = str(run.train.init_from)
    try:
        source = open_weights(Path(path))
        return SavedModel(source.config, path, data_path(source.facts.run_config))
    except (CheckpointError, OSError) as error:
        is_unknown = resume == "auto" and run.run_dir is None
        fix = "; to go on with a run, also name it with --run_dir" if is_unknown else ""
        raise CheckpointError(f"--init_from {path}: {error}{fix}") from error


def subcommands(parser: ArgumentParser) -> Callable[..., argparse.ArgumentParser]:
    """Return add(name, run, description, example), which adds a subcommand and returns its parser.

    The parsed arguments have `run`, the function of the chosen subcommand.
    """
    actions = parser.add_subparsers(dest="verb", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], None], description: str, example: str
    ) -> argparse.ArgumentParser:
        texts: dict[str, Any] = {"help": description, "description": description}
        action = actions.add_parser(name, examples=[example], **texts)
        action.set_defaults(run=run)
        return action

    return add


def counted(text: str) -> int:
    """argparse type: an integer from 1 to 10^9."""
    number = int(text) if text.isdecimal() and len(text) <= 10 else 0
    if not 1 <= number <= 10**9:
        raise argparse.ArgumentTypeError(f"{text[:20]} is not a whole number from 1 to 10^9")
    return number


def _positive(text: str) -> float:
    """argparse type: a number > 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number > 0")
    return number


def _value(text: str) -> Any:
    """Return the JSON value of `text`, or `text` if it is not JSON."""
    try:
        return parse(text, "--set")
    except ConfigError:
        return text
