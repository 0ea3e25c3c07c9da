"""DeepSpeed's monitors receive the numbers of the console, each step once, also after a resume."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from fgpt.distributed.launch import World
from fgpt.engine.deepspeed.monitors import Monitors, _continue_csv_files
from fgpt.engine.deepspeed.ops import init_communication
from tests.ranks import run_ranks
from tests.tiny import Outcome, Tiny, train_all

ON = {"enabled": True}
FAKE_WANDB = """
import json, os
def _record(*call):
    with open(os.environ["FAKE_WANDB"], "a") as file:
        file.write(json.dumps(call) + "\\n")
def init(**options):
    if "refused" in options["project"]:
        raise RuntimeError("api_key not configured (no-tty)\\ndetails")
    _record("init", options, {k: v for k, v in os.environ.items() if k.startswith("WANDB_")})
def log(data, step=None, commit=None):
    _record("log", data, step)
"""


def rows(file: Path) -> list[tuple[int, float]]:
    """(step, value) of a monitor's CSV file with one header."""
    with open(file) as lines:
        header, *values = csv.reader(lines)
    assert header[0] == "step"
    return [(int(step), float(value)) for step, value in values]


def events(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a TensorBoard tag."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(folder))
        board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def assert_same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    """The same steps in the same order, and their values."""
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [y for _, y in found] == pytest.approx([y for _, y in expected])


def with_fake_wandb(world: World, folder: Path, runs: list[list[str]]) -> list[Outcome]:
    sys.path.insert(0, str(folder))
    return train_all(world, runs)


def test_csv_files_of_another_run_are_never_cut(tmp_path: Path) -> None:
    said: list[str] = []
    folder, a, b = (tmp_path / name for name in "fab")
    folder.mkdir()

    def start(run_dir: Path, step: int) -> list[str]:
        return _continue_csv_files(folder, run_dir, step, said.append)

    (folder / "other.csv").write_bytes(b"\xff\xfe, not ours")
    (folder / "gone.csv").symlink_to(folder / "nowhere")
    assert start(a, 0) == []
    for run_dir, values in ((a, "12"), (b, "3456")):
        start(run_dir, 0)
        rows = "".join(f"{step},{value}\n" for step, value in enumerate(values, 1))
        (folder / "loss.csv").write_text("step,loss\n" + rows)
    assert start(b, 2) == ["loss"]
    assert (folder / "loss.csv").read_text() == "step,loss\n1,3\n2,4\n"
    assert said == [] and start(a, 1) == []
    assert "was last written by" in said[0] and str(b) in said[0]
    assert (folder / "loss.1.csv").read_text() == "step,loss\n1,1\n2,2\n"
    assert (folder / "loss.2.csv").read_text() == "step,loss\n1,3\n2,4\n"
    assert (folder / "other.csv").read_bytes() == b"\xff\xfe, not ours"


def stop_before_the_step_is_logged(world: World, folder: Path) -> None:
    init_communication("cpu")
    csv = {"csv_monitor": {**ON, "output_path": str(folder), "job_name": "csv"}}
    monitors = Monitors(csv, folder, lambda: 21, print)
    monitors.write_events([("Train/Samples/elapsed_time_ms_step", 2.5, 168)])
    monitors.close()


@pytest.mark.dist
def test_the_last_step_before_a_signal_is_written(tmp_path: Path) -> None:
    run_ranks(stop_before_the_step_is_logged, 1, tmp_path)
    assert rows(tmp_path / "csv" / "train_elapsed_time_ms_step.csv") == [(21, 2.5)]


@pytest.mark.dist
def test_each_step_is_monitored_once(tiny: Tiny) -> None:
    own = tiny.folder / "monitors"
    (tiny.folder / "wandb.py").write_text(FAKE_WANDB)
    named = tiny.ds(
        "named",
        csv_monitor={**ON, "output_path": str(own), "job_name": "csv"},
        tensorboard={**ON, "output_path": str(own)},
        wall_clock_breakdown=True,
    )
    unnamed = tiny.ds("unnamed", csv_monitor=ON, tensorboard=ON, wandb=ON)
    refused = tiny.ds("refused", wandb={**ON, "project": "refused"})
    often = ("--set=train.log_every=1", "--set=eval.every=3")
    runs = [
        tiny.flags("a", *often, ds=named),
        tiny.flags("a", *often, ds=named),  # a new run in the monitors' directories of the first
        tiny.flags("b", *often, ds=unnamed),
        tiny.flags("b", *often, "--resume", tiny.checkpoint("b", 4), ds=unnamed),
        tiny.flags("c", ds=refused),
    ]
    env = {"FAKE_WANDB": str(tiny.folder / "calls")}
    outcomes, others = run_ranks(with_fake_wandb, 2, tiny.folder, runs, env=env)
    # 1. the numbers of the console, by step; no earlier run's
    assert [o.code for o in outcomes] == [0, 0, 0, 0, 2], outcomes
    a, b = tiny.losses("a"), tiny.losses("b")
    assert_same(rows(own / "csv" / "train_loss.csv"), a)
    assert [step for step, _ in rows(own / "csv" / "valid_loss.csv")] == [0, 3, 6]
    assert len(rows(own / "csv" / "train_loss.1.csv")) == 6
    forward = rows(own / "csv" / "train_elapsed_time_ms_forward.csv")
    assert [step for step, _ in forward] == [1, 2, 3, 4, 5, 6]
    assert not list((own / "csv").glob("Train_Samples*"))
    assert_same(events(own / "a", "train/loss"), a)
    # 2. by default in the run directory; after the resume at step 4 each step once
    assert_same(rows(tiny.path("b") / "csv_monitor" / "train_loss.csv"), b)
    assert_same(events(tiny.path("b") / "tensorboard", "train/loss"), b)
    assert [s for s, _ in events(tiny.path("b") / "tensorboard", "valid/loss")] == [0, 3, 6]
    # 3. W&B: the resumed run has the first one's id
    calls = [json.loads(line) for line in (tiny.folder / "calls").read_text().splitlines()]
    starts: list[Any] = [call for call in calls if call[0] == "init"]
    (_, options, first), (_, _, second) = starts
    assert options["project"] == "deepspeed" and first["WANDB_DIR"] == str(tiny.path("b"))
    assert first["WANDB_RUN_ID"] == second["WANDB_RUN_ID"] and second["WANDB_RESUME"] == "allow"
    logged = [(call[2], call[1]["train/loss"]) for call in calls if "train/loss" in call[1]]
    assert_same(logged, b + b[4:])
    # 4. a monitor that cannot be opened is one line on every rank
    for outcome in (outcomes[4], others[4]):
        assert outcome.code == 2 and "wandb: api_key not configured (no-tty);" in outcome.error
        assert "WANDB_MODE=offline" in outcome.error
