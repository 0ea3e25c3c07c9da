"""The tutorial's commands: the parsers accept them, and they run one after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fgpt.report.run_record import METRICS, read_metrics
from tests.cli.parse_only import parse_only
from tests.docs.environment import make_environment
from tests.docs.user import commands, make_user, run_all
from tests.ranks import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"


def losses(run: Path) -> list[float]:
    """The loss of each step."""
    return list(read_metrics(run / METRICS).curves().losses)


def test_ten_steps_with_commands() -> None:
    steps = re.split(r"^## (?=\d)", TUTORIAL.read_text().split("## From here")[0], flags=re.M)[1:]
    assert [step.split(".")[0] for step in steps] == [str(n) for n in range(1, 11)]
    for step in steps:
        assert re.search(r"^    (\$ )?(fgpt|python|deepspeed|torchrun) ", step, re.M), step


def test_parsers_accept_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(commands(TUTORIAL))
    assert len(found) > 18
    for command in found:
        parse_only(command, monkeypatch)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
def test_every_command_runs(tmp_path: Path) -> None:
    scripts = make_environment(tmp_path / "venv", ["transformers"])
    user = make_user(tmp_path, scripts)
    run_all(commands(TUTORIAL), user)
    runs = {name: losses(user.clone / "runs" / name) for name in ("one", "two", "four")}
    assert runs["two"] == pytest.approx(runs["one"], abs=1e-5)
    four = runs["four"]
    assert len(four) == 3  # two steps on four ranks, one elsewhere
    assert four[:2] == pytest.approx(runs["one"], abs=1e-5)
    assert (user.clone / "exported" / "model.safetensors").stat().st_size > 0
