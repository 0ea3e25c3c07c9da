"""Every help ends with examples, and the parsers accept them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fgpt.cli import VERBS, main, train
from tests.cli.parse_only import FIRST_WORDS, parse_only
from tests.cli.test_arguments import parser_of

BENCHMARKS = ("single", "multi", "data", "checkpoint", "recipe")


def all_helps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The arguments, without --help, of every verb and subcommand."""
    for verb in VERBS:
        yield [verb]
        if verb == "bench":  # its parsers are made one at a time
            yield from ([verb, name] for name in BENCHMARKS)
        elif (group := parser_of(monkeypatch, verb)._subparsers) is not None:
            (actions,) = group._group_actions
            yield from ([verb, name] for name in actions.choices or ())


def examples_of(help_text: str) -> list[str]:
    """The lines below the heading of the examples. Fails if other text is below them."""
    lines = help_text.rstrip().splitlines()
    headings = [i for i, line in enumerate(lines) if line in ("example:", "examples:")]
    assert headings, f"no example:\n{help_text[-600:]}"
    examples = lines[headings[-1] + 1 :]
    assert examples, "a heading without an example"
    for line in examples:
        assert line.startswith("  ") and line.split()[0] in FIRST_WORDS, line
    return [line.strip() for line in examples]


def test_every_help_ends_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    helps = list(all_helps(monkeypatch))
    assert ["data", "import"] in helps and ["checkpoint", "average"] in helps and len(helps) > 25
    for words in helps:
        capsys.readouterr()
        with pytest.raises(SystemExit, match="0"):
            main([*words, "--help"])
        for example in examples_of(capsys.readouterr().out):
            assert f"fgpt {' '.join(words)}" in example.replace("-m fgpt.cli", "fgpt"), example
            parse_only(example, monkeypatch)


def test_the_help_of_training_ends_with_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    for example in examples_of(train.parser().format_help()):
        parse_only(example, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "fgpt generate runs/a --promt x",
        "fgpt nothing",
        "fgpt bench single --rows nothing",
        "deepspeed launchers/train.py --ds_config a.json --step 3 --stpes 4",
        "torchrun -m fgpt.cli eval",
        "ls texts",
    ],
)
def test_a_wrong_example_is_noticed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        parse_only(command, monkeypatch)
