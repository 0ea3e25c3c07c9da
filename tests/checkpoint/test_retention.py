"""Which checkpoints stay: the newest, every N steps for ever, and the best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fgpt.checkpoint.manager import Checkpoints
from fgpt.checkpoint.manifest import read_manifest
from fgpt.config.schema import CheckpointConfig
from fgpt.errors import CheckpointError
from tests.checkpoint.saved import FakeEngine, info
from tests.checkpoint.test_file_systems import checkpoints
from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all


def save(points: Checkpoints, step: int, valid_loss: float | None = None) -> None:
    engine: Any = FakeEngine(step)
    points.save(engine, info(valid_loss=valid_loss))


def kept(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in root.glob("step_*"))


@pytest.mark.usefixtures("one_rank")
def test_every_n_steps_for_ever(tmp_path: Path) -> None:
    points = checkpoints(tmp_path, options=CheckpointConfig(keep_every=4))
    for step in range(2, 16, 2):
        save(points, step)
    assert kept(tmp_path) == [4, 8, 12, 14]
    points = checkpoints(tmp_path)  # a later start without the option
    save(points, 16)
    save(points, 18)
    assert kept(tmp_path) == [4, 8, 12, 16, 18]


@pytest.mark.usefixtures("one_rank")
def test_the_best_stays(tmp_path: Path) -> None:
    options = CheckpointConfig(best=True)
    losses = {2: 5.0, 4: 3.0, 6: math.nan, 8: 4.0, 10: 3.5}
    points = checkpoints(tmp_path, options=options)
    for step, loss in losses.items():
        save(points, step, loss)
    assert kept(tmp_path) == [4, 8, 10]
    assert (
        points.directory.best() == tmp_path / "step_00000004"
        and points.directory.lowest_valid_loss() == 3.0
    )
    save(points, 12, 2.5)
    assert kept(tmp_path) == [10, 12] and points.directory.best() == tmp_path / "step_00000012"
    # a resume from step 10 sets the best aside: it will be trained again
    points.directory.rename_newer(10)
    assert points.directory.best() is None
    assert points.directory.lowest_valid_loss() is None
    save(checkpoints(tmp_path, options=options), 14, 9.0)
    assert points.directory.best() == tmp_path / "step_00000014"
    later = checkpoints(tmp_path)  # without the option
    for step in (16, 18, 20):
        save(later, step)
    assert kept(tmp_path) == [14, 18, 20]
    (tmp_path / "best").unlink()
    (tmp_path / "best").mkdir()
    with pytest.raises(CheckpointError, match="best: is a directory: remove it"):
        later.directory.prepare()


@pytest.mark.dist
def test_a_run(tiny: Tiny) -> None:
    """A checkpoint where the evaluation was the best so far, also after a resume."""
    options = ("--set=checkpoint.best=true", "--set=eval.every=1", "--set=checkpoint.every=4")
    runs = [
        tiny.flags("run", *options, "--steps", 4),
        tiny.flags("run", *options, "--steps", 6, "--resume", "auto"),
    ]
    outcomes = run_ranks(train_all, 2, runs)[0]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    lines = (tiny.path("run") / "metrics.jsonl").read_text().splitlines()
    evaluated = {r["step"]: r["valid_loss"] for r in map(json.loads, lines) if "valid_loss" in r}
    del evaluated[0]
    best = min(evaluated, key=lambda step: evaluated[step])
    folder = tiny.path("run") / "checkpoints"
    assert (folder / "best").read_text() == f"step_{best:08d}\n"
    assert read_manifest(folder / f"step_{best:08d}").valid_loss == evaluated[best]
