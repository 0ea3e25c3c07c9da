"""`fgpt eval` prints the run's own validation loss, answers suites, and refuses bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fgpt.cli import main
from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all, zero

QUESTIONS = [
    {"context": "def f(", "choices": ["self", " x ="], "answer": 0},
    {"context": "import ", "choices": ["os", ")("], "answer": 0},
    {"context": "return", "choices": [" x", "+-"], "answer": 1},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Tiny:
    """A run with evaluations of four global batches of eight samples."""
    tiny = Tiny(tmp_path_factory.mktemp("evaluated"), small_data)
    more = ("--set=eval.batches=4", "--set=data.seq_len=16")
    ds = tiny.ds(train_micro_batch_size_per_gpu=4, **zero(2))
    (outcome,) = run_ranks(train_all, 2, [tiny.flags("run", *more, ds=ds)])[0]
    assert outcome.code == 0, outcome
    return tiny


def evaluated(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *map(str, argv), "--json", "--device", "cpu"]) == 0
    results: dict[str, Any] = json.loads(capsys.readouterr().out)["results"]
    return results


def test_the_loss_is_that_of_the_runs_evaluation(
    trained: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (trained.path("run") / "metrics.jsonl").read_text().splitlines()
    (*_, last) = [r["valid_loss"] for r in map(json.loads, lines) if "valid_loss" in r]
    ((name, found),) = evaluated(capsys, trained.path("run"), "--samples", 32).items()
    value, low, high = found["loss"].values()
    assert name.endswith(", valid") and found["samples"] == 32 and found["tokens"] == 32 * 16
    assert value == pytest.approx(last, rel=1e-5) and low < value < high
    assert list(found["perplexity"].values()) == pytest.approx(
        [math.exp(x) for x in (value, low, high)]
    )
    bits = value * found["tokens"] / math.log(2) / found["bytes"]
    assert found["bits_per_byte"]["value"] == pytest.approx(bits)
    # another batch size, and all of the split
    again = evaluated(capsys, trained.path("run"), "--samples", 32, "--batch", 5)[name]
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert again["bytes"] == found["bytes"]
    whole = evaluated(capsys, trained.path("run"))[name]
    assert whole["samples"] == 2890 // 16 - 1


def test_suites(trained: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    checkpoint = trained.checkpoint("run", 6)
    argv = (checkpoint, "--suite", path, "--suite", "python", "--limit", 2)
    found = evaluated(capsys, *argv)
    assert list(found) == [str(path), "python"]
    assert found[str(path)]["questions"] == 2 and found["python"]["samples"] == 2
    for key in ("accuracy", "nats_per_answer"):
        assert list(found[str(path)][key]) == ["value", "low", "high"]
    assert main(["eval", str(checkpoint), "--suite", str(path), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "accuracy by length" in out and "95 % interval" in out


def test_bad_input(trained: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained.path("run"))
    (tmp_path / "bad.jsonl").write_text("{")
    cases = {
        (run, "--suite", "missing.jsonl"): "--suite missing.jsonl: no such file; name one of",
        (run, "--suite", str(tmp_path / "bad.jsonl")): "bad.jsonl: line 1: ",
        (run, "--seq_len", "64"): "--seq_len 64: the model's context is 32 tokens",
        (run, "--data", str(tmp_path)): str(tmp_path),
        (run, "--split", "test"): "--split test",
        (str(tmp_path),): "has no weights",
    }
    for argv, text in cases.items():
        assert main(["eval", *argv, "--device", "cpu"]) == 2, argv
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line, line


TASK = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow  # the harness reads all of its tasks' names, twice
def test_lm_evaluation_harness_agrees(
    trained: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a local task: its accuracy is that of the same questions without the harness."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "mine.yaml").write_text(TASK.format(file=path))
    run = trained.path("run")
    argv = ("--suite", path, "--suite", "lm-eval:mine", "--include", tmp_path)
    found = evaluated(capsys, run, *argv)
    assert found["lm-eval:mine"]["acc"] == pytest.approx(found[str(path)]["accuracy"]["value"])
    unknown = ["eval", str(run), "--suite", "lm-eval:nothing", "--device", "cpu"]
    assert main(unknown) == 2
    assert "unknown task 'nothing'" in capsys.readouterr().err
