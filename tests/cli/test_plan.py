"""`fgpt plan`: what it prints and writes, and that what it writes is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fgpt.cli import main
from tests.plan.test_published import BLOOM
from tests.ranks import ROOT

A100 = ["--gpu", "a100-80g"]


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ds_config", "ds_configs/bf16.json", "--model", "gpt2-xl", "--gpus", "8", *A100]
    assert main(["plan", *flags, "--tokens", "1e10", "--gpu_hour", "2"]) == 0
    out = capsys.readouterr().out
    for word in ("gpt2-xl: 1.56B parameters", "fits: ", "matrix products", "tokens/s", "MFU"):
        assert word in out
    assert "1e+10 tokens: " in out and " paid" in out


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ds_config", "ds_configs/zero3.json", "--model", "gpt3-175b", "--gpus", "8", *A100]
    assert main(["plan", *flags]) == 1
    assert "does not fit: " in capsys.readouterr().out
    assert main(["plan", "--max_batch", *flags]) == 1
    assert "fits: 0 samples" in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ds_config", "ds_configs/bf16.json", "--model", "gpt2", "--gpus", "2", *A100]
    assert main(["plan", *flags, "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    memory, step_s = value["memory_bytes"], value["step_s"]
    total = memory.pop("device_total")
    assert value["fits"] and sum(memory.values()) == total
    low, high, all_s = (step_s.pop(name) for name in ("low", "high", "total"))
    assert sum(step_s.values()) == pytest.approx(all_s) and low < all_s < high


def test_fit_writes_what_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = tmp_path / "new", tmp_path / "plan.html"
    fit = ["plan", "--fit", "--model", "llama-8b", "--gpus", "16", *A100, "--write", str(folder)]
    assert main([*fit, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "one step away:" in out and "the next ones that fit:" in out
    assert "launch it: deepspeed --num_nodes 2 --num_gpus 8 launchers/train.py" in out
    files = ["--ds_config", str(folder / "ds_config.json"), "--run_file", str(folder / "run.json")]
    assert main(["check", *files, "--world", "16", "--device", "cuda"]) == 0
    assert "llama-8b" in capsys.readouterr().out
    assert main(["plan", *files, "--gpus", "16", *A100]) == 0
    assert page.read_text().count("data:image/png;base64") == 1
    capsys.readouterr()
    assert main(fit) == 2  # nothing is overwritten
    assert "ds_config.json exists already" in capsys.readouterr().err


def test_days(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--for", "8b", "--gpu", "h100-80g", "--tokens", "1e12"]
    assert main([*flags, "--days", "20"]) == 0
    assert "llama-8b" in capsys.readouterr().out
    assert main([*flags, "--days", "0.001"]) == 2
    assert "not reached" in capsys.readouterr().err
    assert main([*flags, "--days", "90", "--cheapest", "--gpu_hour", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"]["days"] <= 90


def test_published_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(BLOOM) + "\n")
    assert main(["plan", "--published", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count("| s |") == 2  # once in each table


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpus", "8"], "--gpu: name the kind of GPU"),
        (["--gpu", "h1000"], "--gpu h1000: no such device"),
        ([*A100], "--ds_config: name the DeepSpeed JSON, or let --fit choose the layout"),
        (["--fit", *A100, "--model", "nothing"], "nothing"),
        (["--fit", *A100, "--gpus", "999999999"], "--gpus 999999999: at most 1048576"),
        (["--fit", *A100, "--set", "model.n_head=3"], "n_head"),
        (["--fit", *A100, "--model", "gpt2", "--set", "data.seq_len=4096"], "seq_len"),
        ([*A100, "--ds_config", "ds_configs/bf16.json", "--write", "/tmp/x"], "--write: writes"),
        ([*A100, "--days", "3"], "also say the training tokens"),
        (["--fit", *A100, "--max_batch"], "--max_batch: is asked of the layout"),
        (["--fit", *A100, "--gpus", "12", "--nodes", "5"], "does not divide --gpus 12"),
        (["--fit", *A100, "--gpus", "12"], "--gpus 12: is no multiple of 8"),
        (["--fit", *A100, "--model", "gpt-1t", "--no_offload"], "gpt-1t does not fit on 8"),
        (["--fit", *A100, "--gpus", "16", "--model", "mini", "--global_batch", "7"], "_batch 7"),
        (["--fit", *A100, "--micro_batch", "4"], "--micro_batch: --fit chooses it"),
        (["--for", "large", *A100], "--for large: write a number of parameters"),
        (["--fit", *A100, "--days", "3"], "also say the training tokens"),
        (["--fit", *A100, "--days", "nan"], "nan is not a number above 0"),
        (["--fit", *A100, "--model", "gpt2", "--write", "Makefile"], "--write Makefile: "),
        (["--fit", *A100, "--model", "gpt2", "--html", "/proc/x"], "--html /proc/x: "),
        (["--published", "absent.jsonl"], "absent.jsonl"),
        ([*A100, "--hardware", "Makefile"], "Makefile"),
    ],
)
def test_wrong_input(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(["plan", *flags])
    except SystemExit as error:  # argparse's
        code = error.code
    said = capsys.readouterr()
    assert code == 2 and says in said.err and "Traceback" not in said.err
