"""Whether a command line is one that FGPT's parsers accept, without running it."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

import pytest

from fgpt.cli import main, train
from fgpt.cli.arguments import ArgumentParser

FIRST_WORDS = ("accelerate", "deepspeed", "fgpt", "make", "python", "torchrun")
"""First words of commands."""
SCRIPT, MODULE = "launchers/train.py", "fgpt.cli"


def parse_only(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a parser of FGPT's refuses the command; a launcher's own flags are not examined."""
    first, *words = shlex.split(command)
    assert first in FIRST_WORDS, command
    if SCRIPT in words:
        assert _is_accepted(lambda: train.parser().parse_args(_after(SCRIPT, words))), command
    elif first == "fgpt" or MODULE in words:
        argv = words if first == "fgpt" else _after(MODULE, words)
        assert _is_accepted(lambda: _run_parser(argv, monkeypatch)), command


def _after(word: str, words: list[str]) -> list[str]:
    return words[words.index(word) + 1 :]


def _is_accepted(parse: Any) -> bool:
    try:
        parse()
    except SystemExit:
        return False
    return True


def _run_parser(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a verb until it has parsed its arguments. Raises SystemExit if it refuses them."""
    parse = ArgumentParser.parse_args

    def parse_and_stop(self: ArgumentParser, *args: Any, **kwargs: Any) -> argparse.Namespace:
        parse(self, *args, **kwargs)
        raise KeyboardInterrupt  # the verb ends with 130 before it does anything

    with monkeypatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse_and_stop)
        code = main(argv)
    if code != 130:
        raise SystemExit(code)
