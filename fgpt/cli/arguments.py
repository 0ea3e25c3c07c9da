"""The argument parser of all verbs, and types of arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fgpt.errors import printable


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but a flag that is given twice with two values is said to be.

    The last value is used, so that `make train ARGS="--steps 10"` overrides the Makefile's flags.
    Flags that take several values (actions append and extend) may be repeated.
    `examples` are whole command lines, which end the help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        for name in (None, "store"):
            self.register("action", name, _Store)

    def format_help(self) -> str:
        """Return argparse's help, and the examples on lines of their own, which an epilog wraps."""
        return super().format_help() + with_examples(self.examples)

    def error(self, message: str) -> NoReturn:
        """Print usage and message, without control characters; exit with 2."""
        super().error(printable(message))


class _Store(argparse.Action):
    """Stores a value; warns if it replaces another one that the user gave."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = namespace.__dict__.setdefault("_given", {})
        if option_string and repr(given.get(self.dest, values)) != repr(values):  # nan is not nan
            warn_given_twice(option_string, values)
        given[self.dest] = values
        setattr(namespace, self.dest, values)


def with_examples(examples: Sequence[str]) -> str:
    """Return the end of a help: an empty line, a heading, and one example a line."""
    heading = ["", "examples:" if len(examples) > 1 else "example:"] if examples else []
    return "".join(f"{line}\n" for line in [*heading, *(f"  {each}" for each in examples)])


def warn_given_twice(flag: str, value: object) -> None:
    """Say on rank 0 that a flag was given before with another value."""
    if os.environ.get("RANK", "0") == "0":
        line = f"fgpt: warning: {flag} is given twice; the last value, {value}, is used"
        print(printable(line), file=sys.stderr)


def nonempty(text: str) -> str:
    """argparse type: a name or path."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty (a shell variable that is not set?)")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} holds a NUL character")
    return text


def seed_number(text: str) -> int:
    """argparse type: the seed of random draws."""
    number = int(text) if text.isdecimal() and len(text) < 20 else -1
    if not 0 <= number < 2**62:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^62 - 1")
    return number


def file_path(text: str) -> Path:
    """argparse type: the path of a file or folder."""
    return Path(nonempty(text))
