"""Every flag of launchers/train.py passes each launcher's own parser, in both spellings."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from fgpt.cli.train import parser

ONLY_OURS = {"--run"}  # an older spelling of --run_file, which torchrun takes for --run-path
FLAGS = [
    flag
    for action in parser()._actions
    if not isinstance(action, argparse._HelpAction)
    for flag in action.option_strings
    if flag not in ONLY_OURS
]
SCRIPT = ["launchers/train.py", "--ds_config", "x.json"]


def by_torchrun(args: list[str]) -> list[str]:
    from torch.distributed.run import parse_args

    return list(parse_args(["--standalone", "--nproc-per-node", "2", *args]).training_script_args)


def by_deepspeed(args: list[str]) -> list[str]:
    from deepspeed.launcher.runner import parse_args

    return list(parse_args(["--num_gpus", "2", *args]).user_args)


def by_accelerate(args: list[str]) -> list[str]:
    from accelerate.commands.launch import launch_command_parser

    return list(launch_command_parser().parse_args(args).training_script_args)


@pytest.mark.parametrize("launcher", [by_torchrun, by_deepspeed, by_accelerate])
def test_every_flag_reaches_the_script(launcher: Callable[[list[str]], list[str]]) -> None:
    assert {"--run_file", "--run-file", "--ds-config", "--micro_batch", "--resume"} <= set(FLAGS)
    for flag in FLAGS:
        assert launcher([*SCRIPT, flag, "1"]) == [*SCRIPT[1:], flag, "1"]


def test_both_spellings() -> None:
    for flag in FLAGS:
        assert flag.replace("_", "-") in FLAGS
