"""deepspeed.initialize gets `Resolved.engine_json`, unchanged, in every kind of layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from tests.engine.runs import resolved_run, variant
from tests.ranks import run_ranks

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "clipping by FGPT": (2, {"zero_optimization": {"stage": 0}}, {}),
    "ZeRO-2 on one rank": (1, {"zero_optimization": {"stage": 2}, **BF16}, {}),
    "context parallel": (2, {"zero_optimization": {"stage": 2}}, {"parallel__cp": 2}),
    "timer off": (2, {"zero_optimization": {"stage": 3}}, {}),
}


def given_to_deepspeed(
    world: World, folder: str, ds: dict[str, Any], settings: dict[str, Any]
) -> tuple[Any, ...]:
    """(JSON that deepspeed.initialize gets, engine_json, the user's JSON, changed keys)."""
    config = variant(**ds, train_micro_batch_size_per_gpu=8 // world.size)
    resolved = resolved_run(Path(folder), config, world.size, **settings)
    with mock.patch("deepspeed.initialize", side_effect=InterruptedError) as initialize:
        with pytest.raises(InterruptedError):
            build_engine(resolved, world, torch.device("cpu"))
    keys = {change.key for change in resolved.engine_changes}
    return initialize.call_args.kwargs["config"], resolved.engine_json, resolved.deepspeed, keys


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_gets_the_engine_json(case: str, tmp_path: Path) -> None:
    ranks, ds, settings = CASES[case]
    if "parallel__cp" in settings:
        ds = {**ds, "train_batch_size": 4}
    for given, engine_json, users, keys in run_ranks(
        given_to_deepspeed, ranks, str(tmp_path), ds, settings
    ):
        assert given == engine_json
        different = {k for k in {*engine_json, *users} if engine_json.get(k) != users.get(k)}
        assert different == {key.partition(".")[0] for key in keys}
        assert different  # each case has a change
