"""What DeepSpeed is given, how it differs from the user's JSON, and the fast paths a run misses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fgpt.config.deepspeed.settings import DeepSpeedSettings, value_at
from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.speed import slow_paths
from fgpt.errors import ConfigError
from tests.config.conftest import GOOD, SHIPPED, merged
from tests.config.twins import BF16, FP16, FP32_SUMS, PP2, TP2, offload, parallel, stage

Config = Callable[..., Resolved]
TIMER = ("timers.throughput", None, {"enabled": False})
PRINTED = {"steps_per_print": 1}


@pytest.mark.parametrize(
    ("ds", "run", "world", "expected"),
    [
        ({}, {}, 1, [("gradient_clipping", 1.0, 0.0), TIMER]),
        ({"gradient_clipping": 0, **PRINTED}, {}, 1, []),
        (stage(1) | PRINTED, {}, 2, []),
        (stage(1) | {"timers": {"throughput": {"enabled": True}}}, {}, 2, []),
        (stage(2), parallel(cp=2), 2, [("train_batch_size", 8, 16), TIMER]),
        (stage(2) | PRINTED, {}, 2, []),
        (stage(2) | PRINTED, {}, 1, [("zero_optimization.stage", 2, 1)]),
        (offload(2) | PRINTED, {}, 1, []),
        (
            stage(2) | BF16 | FP32_SUMS | PRINTED,
            {},
            1,
            [("data_types.grad_accum_dtype", "fp32", None), ("zero_optimization.stage", 2, 1)],
        ),
        (stage(2) | BF16 | FP32_SUMS | {"gradient_accumulation_steps": 2, **PRINTED}, {}, 1, []),
        (stage(1) | PRINTED, PP2, 2, []),
        (stage(1) | PRINTED, parallel(tp=2, pp=2), 4, []),
        (
            stage(1) | PRINTED,
            parallel(tp=2, pp=2, sequence=True),
            4,
            [
                ("pipeline.pipe_partitioned", None, False),
                ("pipeline.grad_partitioned", None, False),
            ],
        ),
        ({}, {"train": {"engine": "plain"}}, 1, []),
    ],
)
def test_engine_changes(
    ds: dict[str, Any], run: dict[str, Any], world: int, expected: list[Any], config: Config
) -> None:
    resolved = config(merged(GOOD, ds), run_file=run, world=world)
    assert [change[:3] for change in resolved.engine_changes] == expected
    for key, user, engine, reason in resolved.engine_changes:
        assert value_at(resolved.deepspeed, key) == user
        assert value_at(resolved.engine_json, key) == engine
        assert reason
    if not expected:
        assert resolved.engine_json == resolved.deepspeed


def test_fgpt_clips_without_zero_in_fp32(config: Config) -> None:
    assert config(GOOD).clips_in_fgpt
    assert config(GOOD, "--set", "train.engine=plain").clips_in_fgpt
    assert not config(merged(GOOD, stage(1))).clips_in_fgpt
    assert not config(merged(GOOD, BF16 | stage(1))).clips_in_fgpt


def test_the_record_has_the_engine_json(config: Config) -> None:
    """The user's JSON stays as it was, and the fingerprint does not depend on the changes."""
    record = config(GOOD).to_json()
    assert record["deepspeed"]["gradient_clipping"] == 1.0
    assert record["engine_json"]["gradient_clipping"] == 0.0
    change = record["engine_changes"][0]
    assert (change["key"], change["user"], change["engine"]) == ("gradient_clipping", 1.0, 0.0)
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_mapping_is_treated_as_its_file(file: Path) -> None:
    tree = json.loads(file.read_text())
    before = json.dumps(tree)
    by_file = resolve(RunRequest(file), world=2, device="cuda")
    by_mapping = resolve(RunRequest(file, deepspeed=tree), world=2, device="cuda")
    assert by_mapping == by_file
    by_mapping.deepspeed["optimizer"]["params"]["lr"] = 9
    assert json.dumps(tree) == before


def test_a_mapping_is_read_strictly() -> None:
    tree = merged(GOOD, {"gradient_clipping": math.nan, "tensorboard": {"job_name": "\ud800"}})
    with pytest.raises(ConfigError) as caught:
        resolve(RunRequest(Path("built-in.json"), deepspeed=tree), world=1, device="cpu")
    texts = [str(issue) for issue in caught.value.issues]
    assert len(texts) == 2
    assert texts[0].startswith("built-in.json: gradient_clipping: nan is not a finite number")
    assert texts[1].startswith("built-in.json: tensorboard.job_name: ")


@pytest.mark.parametrize(
    ("ds", "level"),
    [
        ({}, "warning"),
        ({"steps_per_print": 10}, "info"),
        ({"comms_logger": {"enabled": True, "verbose": True}}, "info"),
        ({"wall_clock_breakdown": True, "log_level": "error"}, "error"),
    ],
)
def test_log_level(ds: dict[str, Any], level: str) -> None:
    assert DeepSpeedSettings(ds).log_level == level


@pytest.mark.parametrize(
    ("ds", "run", "world", "device", "expected"),
    [
        ({}, {}, 1, "cpu", []),
        (stage(2), {}, 1, "cuda", []),
        (
            {},
            {"model": {"dropout": 0.1}},
            1,
            "cpu",
            [],
        ),
        (
            stage(3),
            {"model": {"dropout": 0.1}},
            2,
            "cuda",
            ["compiled blocks: off because of model.dropout 0.1, ZeRO-3"],
        ),
        (
            stage(1),
            TP2 | {"model": {"attention": "reference"}},
            2,
            "cuda",
            [
                "fused attention: off because of model.attention reference",
                "compiled blocks: off because of tp 2",
                "fused head and loss: off because of tp 2",
            ],
        ),
        (
            FP16 | stage(1),
            {"speed": {"compile": "off"}},
            1,
            "cuda",
            [
                "compiled blocks: off because of speed.compile off",
                "fused head and loss: off because of fp16",
            ],
        ),
        (
            {},
            {"speed": {"loss": "plain"}},
            1,
            "cpu",
            ["fused head and loss: off because of speed.loss plain"],
        ),
    ],
)
def test_slow_paths(
    ds: dict[str, Any],
    run: dict[str, Any],
    world: int,
    device: str,
    expected: list[str],
    config: Config,
) -> None:
    resolved = config(merged(GOOD, ds), run_file=run, world=world, device=device)
    assert slow_paths(resolved) == expected


def test_shipped_run_files_take_the_fast_paths() -> None:
    for file in sorted((SHIPPED[0].parents[1] / "launchers" / "runs").glob("*.json")):
        resolved = resolve(RunRequest(SHIPPED[0], run_file=file), world=1, device="cuda")
        assert slow_paths(resolved) == [], file
