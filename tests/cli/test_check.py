"""`fgpt check`: what it prints, and its issues."""

from __future__ import annotations

import json

import pytest

from fgpt.cli.check import check_verb
from fgpt.errors import ConfigError
from tests.config.conftest import ROOT

ZERO1 = str(ROOT / "ds_configs" / "zero1.json")
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert check_verb(["--ds_config", ZERO2, "--world", "4", "--device", "cpu", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "world 4 = tp 1 x pp 1 x dp 4; global batch 32 = micro 8 x accumulation 1 x dp 4" in out
    assert "8192 tokens per step = global batch 32 x seq_len 256" in out
    rows = {words[0]: words[1:] for line in out.splitlines() if (words := line.split())}
    assert rows["train.seed"] == ["5", "flag", "--seed"]
    assert rows["zero_optimization.stage"][0] == "2"
    assert rows["scheduler.params.warmup_num_steps"][0] == "50"


def test_stages(capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--tp", "2", "--pp", "2", "--world", "4", "--device", "cpu"]
    assert check_verb(["--ds_config", ZERO1, *grid]) == 0
    out = capsys.readouterr().out.split("memory of a rank")[1]
    assert "embedding .. blocks.1" in out and "blocks.2 .. head" in out
    assert check_verb(["--ds_config", ZERO1, *grid, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [row["last"] for row in stages] == ["blocks.1", "head"]
    assert f"{stages[0]['params']:,}" in out


def test_no_stages_where_a_rank_holds_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_verb(["--ds_config", ZERO1, "--cp", "2", "--world", "2", "--device", "cpu"]) == 0
    assert "memory of a rank" not in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_verb(["--ds_config", ZERO2, "--device", "cuda", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["batch"]["global_size"] == 8
    assert shown["origins"]["run.train.steps"] == "default"
    assert len(shown["fingerprint"]) == 64


def test_issues_reach_the_caller() -> None:
    with pytest.raises(ConfigError, match="configuration: 1 error\n  1. no.json: does not exist"):
        check_verb(["--ds_config", "no.json", "--device", "cpu"])


@pytest.mark.parametrize("flags", [["--world", "0"], ["--world", "x"], ["--device", "tpu"], []])
def test_malformed_flags_exit_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        check_verb(["--ds_config", ZERO2, *flags] if flags else [])
    assert caught.value.code == 2
