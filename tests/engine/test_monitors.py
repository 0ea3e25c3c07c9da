"""DeepSpeed's monitors receive the numbers of the console."""

from __future__ import annotations

import csv
import warnings

import pytest

from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all


@pytest.mark.dist
def test_csv_and_tensorboard(tiny: Tiny) -> None:
    out = str(tiny.folder / "monitors")
    ds = tiny.ds(
        csv_monitor={"enabled": True, "output_path": out, "job_name": "csv"},
        tensorboard={"enabled": True, "output_path": out, "job_name": "board"},
    )
    flags = tiny.flags("a", "--set=train.log_every=3", "--set=eval.every=3", ds=ds)
    (outcome,), _ = run_ranks(train_all, 2, [flags])
    assert outcome.code == 0, outcome
    records = {r["step"]: r for r in tiny.records("a")}
    with open(tiny.folder / "monitors" / "csv" / "train_loss.csv") as file:
        rows = list(csv.reader(file))[1:]
    # global batch 4: the x axis is samples
    assert [int(float(x)) for x, _ in rows] == [12, 24]
    assert [float(y) for _, y in rows] == pytest.approx([records[3]["loss"], records[6]["loss"]])
    with open(tiny.folder / "monitors" / "csv" / "valid_loss.csv") as file:
        assert len(list(csv.reader(file))[1:]) == 3  # steps 0, 3 and 6
    board = tiny.folder / "monitors" / "board"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(board))
        events.Reload()
    assert "train/loss" in events.Tags()["scalars"]
    values = [event.value for event in events.Scalars("train/loss")]
    assert values == pytest.approx([records[3]["loss"], records[6]["loss"]])
