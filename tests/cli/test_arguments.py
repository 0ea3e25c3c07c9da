"""Flags given twice, in every verb, and those that may be repeated."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import pytest

from fgpt.cli import (
    bench,
    bench_checkpoint,
    bench_data,
    doctor,
    main,
    parity,
    report,
    resume_check,
    train,
)
from fgpt.cli.arguments import ArgumentParser
from fgpt.cli.run_flags import request_of
from fgpt.data.recipe import SourceSpec

REPEATED = {"--input", "--rows", "--only", "--kinds"}
"""Flags that take several values, as does --tokenizer of `fgpt tokenizer report`."""


def parser_of(monkeypatch: pytest.MonkeyPatch, *argv: str) -> ArgumentParser:
    """The parser of a verb that builds it as it runs."""
    caught: list[ArgumentParser] = []

    def parse_args(self: ArgumentParser, args: object = None) -> None:
        caught.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_args)
    assert main(list(argv)) == 130
    monkeypatch.undo()
    return caught[0]


def all_parsers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ArgumentParser]]:
    yield "train.py", train.parser()
    for name, make in {
        "doctor": doctor._parser,
        "parity": parity._parser,
        "resume-check": resume_check._parser,
        "report": report._parser,
        "bench data": bench_data._parser,
        "bench checkpoint": bench_checkpoint._parser,
    }.items():
        yield name, make()
    for name in ("single", "multi"):
        yield f"bench {name}", bench._parser(name)
    for verb in ("prepare", "check"):
        yield verb, parser_of(monkeypatch, verb)
    for verb in ("tokenizer", "data"):
        (actions,) = parser_of(monkeypatch, verb)._subparsers._group_actions  # type: ignore[union-attr]
        for name, parser in actions.choices.items():  # type: ignore[union-attr]
            yield f"{verb} {name}", parser


def two_values(action: argparse.Action) -> tuple[str, str]:
    """Two valid values of a flag."""
    if action.choices:
        first, second, *_ = map(str, action.choices)
        return first, second
    for pair in (("1", "2"), ("true", "false"), (".", "/"), ("data", "batch"), ("mini", "gpt2")):
        try:
            for value in pair:
                if action.type is not None:
                    action.type(value)  # type: ignore[operator]
            return pair
        except (ValueError, argparse.ArgumentTypeError):
            continue
    raise AssertionError(action)


def with_all_optional(parser: ArgumentParser) -> list[argparse.Action]:
    """Require nothing; returns the flags that take a value."""
    for action in (*parser._actions, *parser._mutually_exclusive_groups):
        action.required = False
    return [a for a in parser._actions if a.option_strings and a.nargs != 0]


def test_a_flag_given_twice_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    parsers = list(all_parsers(monkeypatch))
    capsys.readouterr()
    places = [(verb, p, action) for verb, p in parsers for action in with_all_optional(p)]
    assert len(places) > 100
    for verb, parser, action in places:
        flag, spelling = action.option_strings[0], action.option_strings[-1]
        place = f"{verb} {flag}"
        first, second = two_values(action)
        if flag in ("--set", "--ds_set"):
            first, second = f"train.steps={first}", f"train.steps={second}"
        parser.parse_known_args([flag, first, spelling, first])
        assert capsys.readouterr().err == "", place
        parsed, _ = parser.parse_known_args([flag, first, spelling, second])
        value, err = getattr(parsed, action.dest), capsys.readouterr().err
        is_single = place in ("bench data --input", "bench checkpoint --rows")
        if (flag in REPEATED and not is_single) or place == "tokenizer report --tokenizer":
            assert err == "" and [str(each) for each in value] == [first, second], place
        else:
            assert len(err.splitlines()) == 1 and spelling in err, place
            assert "is given twice; the last value" in err, place


def test_nan_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_argument("--x", type=float)
    parser.parse_args(["--x", "nan"])
    assert capsys.readouterr().err == ""


def test_the_last_one_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    """As `make train ARGS="--steps 10"` does."""
    argv = ["--ds_config", "x.json", "--steps", "300", "--steps", "10"]
    request = request_of(train.parser().parse_args(argv))
    assert [override.value for override in request.overrides] == [300, 10]
    line = "fgpt: warning: --steps is given twice; the last value, 10, is used\n"
    assert capsys.readouterr().err == line
    train.parser().parse_args([*argv, "--set", "train.steps=10", "--set", "train.seed=1"])
    assert capsys.readouterr().err == line
    train.parser().parse_args(
        ["--ds_config", "x", "--lr", "1e-3", "--ds_set", "a=1", "--ds_set", "a=2"]
    )
    assert "--ds_set a is given twice; the last value, 2, is used" in capsys.readouterr().err


def test_only_rank_0_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    train.parser().parse_args(["--ds_config", "x", "--steps", "3", "--steps", "4"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "flags", [["--input", "a", "--input", "b"], ["--input", "a", "b"], ["--input=a", "--input=b"]]
)
@pytest.mark.parametrize(
    "verb", [["prepare"], ["tokenizer", "train", "--out", "t"], ["tokenizer", "report"]]
)
def test_several_inputs(flags: list[str], verb: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SourceSpec] = []

    def open_corpus(spec: SourceSpec, errors: str) -> Any:
        seen.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr("fgpt.prepare.pipeline.open_corpus", open_corpus)
    monkeypatch.setattr("fgpt.cli.tokenizer.open_corpus", open_corpus)
    monkeypatch.setattr("fgpt.cli.tokenizer.load_tokenizer", lambda *args: None)
    extra = ["--tokenizer", "t"] if verb[-1] == "report" else []
    assert main([*verb, *flags, *extra]) == 130
    assert seen[0].paths == ("a", "b")


@pytest.mark.parametrize(
    "argv",
    [
        ["prepare", "--input", "x", "--tokenizer", "t", "--vocab_size", "0"],
        ["tokenizer", "report", "--input", "x", "--tokenizer", "t", "--kind", "bpe"],
        ["tokenizer", "report", "--input", "x", "--tokenizer", "t", "--vocab_size", "500"],
        ["data", "inspect", "x", "--json", "--split", "test"],
        ["data", "inspect", "x", "--json", "--samples", "3"],
        *(
            ["data", "import", "--train", "x", "--valid", "y", "--tokenizer", "t", "--out", "o", *f]
            for f in (["--seed", "0"], ["--validation_fraction", "0"])
        ),
    ],
)
def test_flags_without_effect(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert "no effect" in capsys.readouterr().err


def test_control_characters_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--input", "x", "--\x1b[31mred"])
    assert main(["\x1b[31mred"]) == 2
    assert "\x1b" not in capsys.readouterr().err
