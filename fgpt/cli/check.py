"""`fgpt check`: print the resolved configuration, or every issue, without starting anything."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fgpt.checkpoint.size import checkpoint_bytes, describe_saving
from fgpt.cli.arguments import ArgumentParser, file_path
from fgpt.cli.run_flags import add_run_flags, counted, request_of
from fgpt.config.field_syntax import parse_blend, parse_stages
from fgpt.config.fix import HEADINGS, fix
from fgpt.config.resolve import Resolved, resolve
from fgpt.config.show import render
from fgpt.errors import ConfigIssue, UserError
from fgpt.utils.files import write_atomic
from fgpt.utils.keys import AUTO, shown

TOTAL = "scheduler.params.total_num_steps"


def check_verb(argv: Sequence[str]) -> int:
    """Run the verb. Returns 0; raises ConfigError with every issue, which exits with 2."""
    parser = ArgumentParser(
        prog="fgpt check",
        description="Print the resolved configuration with each value's origin, or every issue.",
        examples=(
            "fgpt check --ds_config ds_configs/zero2.json --world 4",
            "fgpt check --ds_config mine.json --world 2 --fix new.json",
        ),
    )
    add_run_flags(parser)
    # every flag of launchers/train.py is accepted; where a run continues is not part of its check
    for flag in ("--resume", "--allow"):  # of a run's command line
        parser.add_argument(flag, help="accepted, not examined: it needs the checkpoint")
    group = parser.add_argument_group("the machines")
    group.add_argument(
        "--world", type=counted, default=1, metavar="N", help="processes (default 1)"
    )
    group.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda if this machine has it, else cpu"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group.add_argument(
        "--fix", type=file_path, metavar="OUT.json", help="write the DeepSpeed JSON that runs"
    )
    args = parser.parse_args(argv)
    device = args.device or _local_device()
    if args.fix:
        return _fix(args, argv, device)
    resolved = resolve(request_of(args), world=args.world, device=device)
    _check_data(resolved)
    if args.json:
        print(json.dumps(_as_json(resolved), indent=2))
        return 0
    # piped output has no terminal width, and the origins need space
    console = Console(width=None if sys.stdout.isatty() else 120)
    render(resolved, console)
    console.print(Text(f"checkpoints: {describe_saving(resolved)}"), soft_wrap=True)
    if _is_divided(resolved):
        from fgpt.plan.memory import render_stages, stage_table

        render_stages(stage_table(resolved), console)
    return 0


def _fix(args: argparse.Namespace, argv: Sequence[str], device: str) -> int:
    """Write the JSON that runs, and print what became of the user's."""
    if os.path.lexists(args.fix):
        raise UserError(f"--fix {args.fix}: exists already; choose a new name")
    fixed = fix(request_of(args), world=args.world, device=device)
    try:
        write_atomic(args.fix, (json.dumps(fixed.deepspeed, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--fix {args.fix}: {error.strerror}; name a file to write") from error
    for heading in HEADINGS:
        issues = fixed.issues.get(heading, [])
        if issues:
            print(f"{heading}:")
        for issue in issues:
            print(f"  {issue}")
    print(f"{args.fix} has these values instead; all others are as in {args.ds_config}:")
    for path, before, now in fixed.values:
        texts = ("absent" if value is None else shown(value) for value in (before, now))
        print(f"  {path}: {' -> '.join(texts)}")
    ranks = f"--num_gpus {args.world} " if args.world > 1 else ""
    flags = [f"--ds_config {args.fix}", *_run_flags(argv), *_flags_of_wishes(fixed.issues)]
    if any(path == TOTAL and before == AUTO for path, before, _ in fixed.values):
        flags.append(f"--steps {fixed.resolved.run.train.steps}")  # the schedule is as long now
    print(f"train with it: deepspeed {ranks}launchers/train.py {' '.join(flags)}")
    return 0


def _check_data(resolved: Resolved) -> None:
    """Raise DataError if a prepared data set has more ids than the model has rows."""
    from fgpt.data.card import CARD_NAME, load_card
    from fgpt.data.token_dataset import check_vocabulary

    data = resolved.run.data
    later = [] if data.stages is None else parse_stages(data.stages)
    texts = (data.path, *(stage.path for stage in later))
    for part in (part for text in texts for part in parse_blend(text)):
        if (Path(part.path) / CARD_NAME).exists():
            card = load_card(Path(part.path))
            check_vocabulary(Path(part.path), card, resolved.run.model.vocab_size)


def _run_flags(argv: Sequence[str]) -> list[str]:
    """The flags of a `fgpt check --fix` that are the run's, and not in the new JSON."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--ds_config", "--ds_set", "--fix", "--world", "--device"):
        parser.add_argument(flag, action="append")
    return [shlex.quote(word) for word in parser.parse_known_args(argv)[1]]


def _flags_of_wishes(issues: Mapping[str, Sequence[ConfigIssue]]) -> list[str]:
    """The flags of what the JSON wished of the run file, which the new JSON no longer says."""
    granted = [issue for group in issues.values() for issue in group if issue.grade != "error"]
    edits = [edit for issue in granted for edit in issue.edits]
    wished = {e.path.removeprefix("run."): e.value for e in edits if e.path.startswith("run.")}
    return [f"--set {path}={shown(value)}" for path, value in wished.items()]


def _as_json(resolved: Resolved) -> dict[str, Any]:
    values = resolved.to_json() | {"fingerprint": resolved.fingerprint()}
    values["checkpoint_bytes"] = checkpoint_bytes(resolved)
    if _is_divided(resolved):
        from fgpt.plan.memory import stage_table

        values["stages"] = [asdict(row) for row in stage_table(resolved)]
    return values


def _is_divided(resolved: Resolved) -> bool:
    """Whether a rank holds only a shard of the model. Only then import the planner and torch."""
    return resolved.batch.tp > 1 or resolved.batch.pp > 1


def _local_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
