"""A resume may not change the grid of ranks, but may change how it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fgpt.checkpoint.identity import check_identity, run_identity, saved_identity
from fgpt.checkpoint.manifest import Manifest
from fgpt.config.resolve import resolve
from fgpt.errors import CheckpointError
from tests.run_flags import parse_run_flags

UNSAID = ("data.packing", "data.document_mask", "data.reset_positions")
DS = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}


def identity(folder: Path, *flags: str) -> dict[str, Any]:
    file = folder / "ds.json"
    file.write_text(json.dumps(DS))
    request = parse_run_flags(["--ds_config", str(file), *flags])
    return run_identity(resolve(request, world=4, device="cpu"), "data")


@pytest.mark.parametrize(
    ("there", "here", "expected"),
    [
        (["--tp", "2"], ["--tp", "4"], "tensor-parallel ranks (tp): checkpoint 2, this run 4;"),
        (["--pp", "2"], ["--pp", "4"], "pipeline stages (pp): checkpoint 2, this run 4;"),
        (["--cp", "2"], ["--cp", "4"], "context-parallel ranks (cp): checkpoint 2, this run 4;"),
        (
            ["--pp", "2", "--set", "parallel.partition=1,3"],
            ["--pp", "2"],
            "parallel.partition: checkpoint '1,3', this run 'parameters';",
        ),
    ],
)
def test_another_grid_is_another_run(
    there: list[str], here: list[str], expected: str, tmp_path: Path
) -> None:
    saved, current = identity(tmp_path, *there), identity(tmp_path, *here)
    with pytest.raises(CheckpointError) as caught:
        check_identity(saved, current, "x")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (["--tp", "2"], ["--tp", "2", "--sequence"]),
        ([], ["--set", "speed.loss=plain", "--set", "speed.matmul=torch"]),
        (["--set", "speed.compile=off"], []),
        (
            ["--pp", "2", "--set", "parallel.partition=1,3"],
            ["--pp", "2", "--set", "parallel.partition=1, 3"],
        ),
    ],
)
def test_the_same_run(there: list[str], here: list[str], tmp_path: Path) -> None:
    check_identity(identity(tmp_path, *there), identity(tmp_path, *here), "x")


def test_a_checkpoint_from_before_packing_could_be_said(tmp_path: Path) -> None:
    current = identity(tmp_path)
    saved = {name: value for name, value in current.items() if name not in UNSAID}
    assert len(saved) == len(current) - 3
    check_identity(saved, current, "x")
    packed = identity(tmp_path, "--set", "data.packing=best_fit")
    with pytest.raises(
        CheckpointError, match="data.packing: checkpoint 'stream', this run 'best_fit';"
    ):
        check_identity(saved, packed, "x")


@pytest.mark.parametrize(
    ("changes", "params", "expected"),
    [
        ({}, {}, False),
        ({}, {"torch_adam": True}, True),
        ({"optimizer": "SGD"}, {}, True),
        ({"train.engine": "plain"}, {}, True),
    ],
)
def test_older_checkpoints_say_by_their_configuration_whose_adam_wrote_them(
    changes: dict[str, Any], params: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    name = "optimizer.params.torch_adam"
    current = identity(tmp_path)
    assert current[name] is True
    old = {key: value for key, value in current.items() if key != name} | changes
    config = {"deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 0.1, **params}}}}
    saved = saved_identity(Manifest(1, 8, old, config, ()))
    assert saved[name] is expected
    assert saved_identity(Manifest(1, 8, {**old, name: True}, config, ()))[name] is True
