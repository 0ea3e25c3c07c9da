"""A run with train.ema: its records, its checkpoints, and who reads the average from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.checkpoint.manifest import read_manifest
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.cli import main
from fgpt.engine.state import EMA
from fgpt.errors import CheckpointError
from fgpt.inference.weights import open_weights
from tests.ranks import run_ranks
from tests.tiny import STEPS, Outcome, Tiny, train_all

pytestmark = pytest.mark.dist
PLAIN = ("--set=train.engine=plain", "--set=eval.every=2")


@pytest.fixture(scope="module")
def tiny(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("runs"), small_data)


@pytest.fixture(scope="module")
def outcomes(tiny: Tiny) -> dict[str, Outcome]:
    """Runs with and without an average, and each resumed the other way."""
    with_, without = tiny.flags("with", *PLAIN, "--set=train.ema=0.5"), tiny.flags("none", *PLAIN)
    resumed = [
        tiny.flags("begun", *PLAIN, "--set=train.ema=0.5", "--resume", tiny.checkpoint("none", 4)),
        tiny.flags("ended", *PLAIN, "--resume", tiny.checkpoint("with", 4)),
    ]
    done = run_ranks(train_all, 1, [with_, without, *resumed])[0]
    assert [outcome.error for outcome in done] == [""] * 4
    return dict(zip(("with", "none", "begun", "ended"), done, strict=True))


def average_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    manifest = read_manifest(checkpoint)
    reader = CheckpointReader(checkpoint, manifest)
    return {name: reader.read(name, EMA) for name in manifest.tensors}


def evaluations(tiny: Tiny, run: str) -> list[dict[str, Any]]:
    lines = (tiny.path(run) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "valid_loss" in record]


def test_it_is_evaluated_and_training_is_the_same(tiny: Tiny, outcomes: dict[str, Outcome]) -> None:
    assert "of the moving average" in outcomes["with"].output
    records = evaluations(tiny, "with")
    assert records[0]["valid_loss_ema"] == records[0]["valid_loss"]  # the initial weights
    assert records[-1]["valid_loss_ema"] != records[-1]["valid_loss"]
    assert tiny.losses("with") == tiny.losses("none")
    assert tiny.losses("ended") == tiny.losses("none")[4:]
    assert not any("valid_loss_ema" in record for record in evaluations(tiny, "none"))


def test_the_verbs_take_it(
    tiny: Tiny, outcomes: dict[str, Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tiny.path("with"))
    final = average_of(tiny.checkpoint("with", STEPS))
    # 1. eval computes the loss that training printed
    assert main(["eval", run, "--ema", "--json", "--samples", "2", "--dtype", "fp32"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"].values()
    loss = found["loss"]["value"]
    assert loss == pytest.approx(evaluations(tiny, "with")[-1]["valid_loss_ema"], abs=1e-4)
    # 2. generate runs; convert writes the average
    assert main(["generate", run, "--ema", "--prompt", "a", "--max_tokens", "2"]) == 0
    out = tmp_path / "exported"
    assert main(["convert", run, "--to", "hf", "--ema", "--out", str(out)]) == 0
    exported = open_weights(out)
    for name, value in final.items():
        assert torch.equal(exported.read(name), value), name
    assert "moving average, decay 0.5" in (out / "README.md").read_text()
    # 3. without one, one line
    capsys.readouterr()
    assert main(["eval", str(tiny.path("none")), "--ema"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no moving average" in line and "leave --ema out" in line
    with pytest.raises(CheckpointError, match="leave it out"):
        open_weights(out, ema=True)


def test_an_average_may_begin_and_end_at_a_resume(tiny: Tiny, outcomes: dict[str, Outcome]) -> None:
    assert "the moving average begins with these weights" in outcomes["begun"].output
    assert not read_manifest(tiny.checkpoint("ended", STEPS)).has_average
    assert not read_manifest(tiny.checkpoint("ended", STEPS)).states == []
    # two steps after the checkpoint that it began with
    reader = {
        n: tiny.checkpoint(r, s) for n, (r, s) in {"4": ("none", 4), "6": ("begun", 6)}.items()
    }
    begun = average_of(reader["6"])
    first = CheckpointReader(reader["4"], read_manifest(reader["4"]))
    last = CheckpointReader(reader["6"], read_manifest(reader["6"]))
    for name, average in begun.items():
        old, new = first.read(name), last.read(name)
        assert not torch.equal(average, new)
        assert (average - new).norm() < (old - new).norm()
