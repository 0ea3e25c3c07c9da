"""The run file's schedule: its derived values, and what it means for the DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fgpt.config.resolve import Resolved
from fgpt.config.schema import ScheduleConfig
from fgpt.config.show import facts
from tests.config.conftest import GOOD, merged
from tests.config.twins import schedule, scheduler

Config = Callable[..., Resolved]
AUTO_LR = merged(GOOD, {"optimizer": {"params": {"lr": "auto"}}})


@pytest.mark.parametrize(
    ("fields", "steps", "expected"),
    [
        # kind, warmup_steps, decay_steps, decay_shape, min_ratio, total_steps
        (schedule("wsd"), 400, ("wsd", 50, 80, "1-sqrt", 0.0, 400)),
        (schedule("wsd"), 3, ("wsd", 1, 1, "1-sqrt", 0.0, 3)),
        (schedule("wsd", warmup_steps=390), 400, ("wsd", 390, 10, "1-sqrt", 0.0, 400)),
        (schedule("wsd", total_steps=100_000), 9, ("wsd", 2000, 20_000, "1-sqrt", 0.0, 100_000)),
        (schedule("cosine", min_ratio=0.1), 2000, ("cosine", 100, 1900, "cosine", 0.1, 2000)),
        (schedule("linear", warmup_steps=0), 10, ("linear", 0, 10, "linear", 0.0, 10)),
        (schedule("constant"), 60, ("constant", 30, 0, None, None, 60)),
        ({}, 400, ("deepspeed", None, None, None, None, None)),
    ],
)
def test_derived_values(
    fields: dict[str, Any], steps: int, expected: tuple[Any, ...], config: Config
) -> None:
    resolved = config(GOOD, run_file=fields | {"train": {"steps": steps}})
    assert resolved.run.schedule == ScheduleConfig(*expected)


def test_it_is_as_long_as_train_tokens_says(config: Config) -> None:
    run = schedule("cosine") | {"train": {"tokens": 8 * 256 * 70}}
    assert config(GOOD, run_file=run).run.schedule.total_steps == 70


def test_fgpt_fills_in_no_scheduler_beside_it(config: Config) -> None:
    assert config(AUTO_LR).deepspeed["scheduler"]["type"] == "WarmupCosineLR"
    for flags in ((), ("--auto", "hf")):
        resolved = config(AUTO_LR, *flags, run_file=schedule("wsd"))
        assert "scheduler" not in resolved.engine_json
        assert not any("scheduler" in str(issue) for issue in resolved.issues)


def test_both_places_are_named(issues: Callable[..., list[str]], config: Config) -> None:
    ds = merged(GOOD, scheduler("WarmupLR", warmup_num_steps=5))
    (found,) = issues(ds, run_file=schedule("wsd"))
    assert "ds.json: scheduler: WarmupLR, and schedule.kind of the run file is wsd -> " in found
    assert "(--ds_set scheduler=null)" in found
    followed = config(ds, "--ds_set", "scheduler=null", run_file=schedule("wsd"))
    assert "scheduler" not in followed.deepspeed and followed.run.schedule.kind == "wsd"
    other = config(ds, run_file=schedule("deepspeed"))
    assert other.deepspeed["scheduler"]["type"] == "WarmupLR"


def test_check_shows_it(config: Config) -> None:
    resolved = config(GOOD, run_file=schedule("wsd", min_ratio=0.1))
    assert dict(facts(resolved))["schedule"] == (
        "wsd, 50 warm-up, 270 constant, 80 decay (1-sqrt) to 0.1 of the peak; 400 steps;"
        " peak optimizer.params.lr 0.001"
    )
    assert resolved.origins["run.schedule.decay_steps"].startswith("derived: total_steps / 5")
    optimizer = {"optimizer": {"params": {"weight_decay": 0.1}}}
    fields = {"momentum_warmup_steps": 30, "weight_decay": "with_lr"}
    resolved = config(merged(GOOD, optimizer), run_file=schedule("cosine", **fields))
    assert resolved.run.schedule.momentum_start == 0.85
    assert dict(facts(resolved))["schedule"] == (
        "cosine, 50 warm-up, 350 decay (cosine) to 0 of the peak; momentum from 0.85 in 30 steps;"
        " weight decay with_lr; 400 steps; peak optimizer.params.lr 0.001"
    )
    text = dict(facts(config(GOOD, run_file=schedule("constant", warmup_steps=0))))["schedule"]
    assert text == "constant, 0 warm-up, 400 constant; 400 steps; peak optimizer.params.lr 0.001"
