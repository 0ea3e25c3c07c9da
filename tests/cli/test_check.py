"""`fgpt check`: what it prints, and its issues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fgpt.cli.check import check_verb
from fgpt.errors import ConfigError, DataError, UserError
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


def test_a_runs_command_line_is_checked_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    resume = ["--resume", "auto", "--allow", "data,batch"]
    assert check_verb(["--ds_config", ZERO2, "--world", "4", "--device", "cpu", *resume]) == 0
    out = capsys.readouterr().out
    assert "checkpoints: " in out and "GiB of host memory per rank" in out


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


OWN = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 0, "stage3_max_live_parameters": 1e9},
    "bf16": {"enabled": True},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "backend": "nccl",
    "elasticity": {"enabled": True},
    "gradient_clipping": "1.0",
}


def test_facts_and_findings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(
        json.dumps({k: v for k, v in OWN.items() if k not in ("elasticity", "gradient_clipping")})
    )
    assert check_verb(["--ds_config", str(file), "--world", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:8] == [
        "recompute: off; no activation_checkpointing asks for it",
        "schedule: WarmupCosineLR, optimizer.params.lr 0.001, warm-up 50 of 400 steps",
        "clipping: to norm 1, by DeepSpeed",
        f"precision: bf16, by bf16.enabled (file {file})",
        "ZeRO stage: 1 (rule half-precision-zero-0)",
    ]
    assert any(
        line.startswith(f"warning: {file}: unknown key 'backend' -> dropped") for line in lines
    )
    assert any(
        line.startswith(f"note: {file}: optimizer: no optimizer is written") for line in lines
    )


def test_fix(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, out = tmp_path / "own.json", tmp_path / "new.json"
    file.write_text(json.dumps(OWN))
    argv = ["--set=train.steps=7", "--data", "a b", "--ds_set", "wall_clock_breakdown=false"]
    argv += ["--ds_config", str(file), "--world", "2", "--device", "cpu", "--fix", str(out)]
    assert check_verb(argv) == 0
    shown = capsys.readouterr().out
    for heading in ("dropped as a capability", "changed", "filled in", "dropped without effect"):
        assert f"{heading}:\n" in shown
    for change in (
        'gradient_clipping: "1.0" -> 1.0',
        'backend: "nccl" -> absent',
        "zero_optimization.stage: 0 -> 1",
        'train_micro_batch_size_per_gpu: "auto" -> 8',
    ):
        assert f"  {change}\n" in shown
    written = json.loads(out.read_text())
    assert written["gradient_clipping"] == 1.0
    assert "elasticity" not in written and "backend" not in written
    assert f"launchers/train.py --ds_config {out} --set=train.steps=7 --data 'a b'\n" in shown
    assert check_verb(["--ds_config", str(out), "--world", "2", "--device", "cpu"]) == 0
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        check_verb(argv)
    argv[-1] = str(out / "below-a-file.json")
    with pytest.raises(UserError, match="; name a file to write"):
        check_verb(argv)


def test_issues_reach_the_caller() -> None:
    with pytest.raises(ConfigError, match="configuration: 1 error\n  1. no.json: does not exist"):
        check_verb(["--ds_config", "no.json", "--device", "cpu"])


@pytest.mark.parametrize("flags", [["--world", "0"], ["--world", "x"], ["--device", "tpu"], []])
def test_malformed_flags_exit_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        check_verb(["--ds_config", ZERO2, *flags] if flags else [])
    assert caught.value.code == 2


def test_data_with_more_ids_than_the_model_has_rows(small_data: Path) -> None:
    argv = ["--ds_config", ZERO2, "--device", "cpu", "--data", str(small_data)]
    assert check_verb(argv) == 0
    with pytest.raises(DataError, match="vocabulary of 400 ids .* the model has 399 rows"):
        check_verb([*argv, "--set", "model.vocab_size=399"])
