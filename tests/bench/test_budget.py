"""The time of a benchmark is a budget: no scenario and no round is begun after it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.bench import run as run_module
from fgpt.bench.job import Job
from fgpt.bench.run import Options, run_scenarios
from fgpt.bench.scenarios import single_device_scenarios

START_S, WARMUP_S, ROUND_S = 4.0, 6.0, 0.5


class Clock:
    """time.monotonic of a machine on which only the ranks take time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeGroup:
    """The ranks of a scenario, which take simulated time."""

    max_rounds = 1000
    warmup: dict[str, Any] = {}

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __enter__(self) -> FakeGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        pass

    def wait_until_started(self) -> None:
        self.clock.now += START_S

    def run_warmup(self) -> None:
        self.clock.now += WARMUP_S
        self.warmup = {
            "setup_s": WARMUP_S,
            "threads": 1,
            "grid": "tp 1",
            "batches": {"train": 1, "predict": 1},
            "memory": {"peak_bytes": 1, "per_rank_bytes": [1], "what": "RSS"},
            "losses": [2.0, 1.0],
            "config": {"batch": {"global_size": 8}, "deepspeed": {}},
        }

    def request(self, command: str) -> dict[str, float]:
        self.clock.now += ROUND_S
        return {"round_s": ROUND_S}


@pytest.mark.parametrize("minutes", [0.01, 1.0, 3.0, 8.0, 60.0])
def test_it_is_kept(minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(run_module, "product_tflops", lambda device: {"fp32": 1.0, "bf16": 1.0})
    monkeypatch.setattr(run_module, "cohort_limit", lambda jobs: 6)
    scenarios = list(single_device_scenarios(("seed-1m", "seed-9m"), ("seed-9m",), ("mini",)))
    said: list[str] = []

    def start(job: Job) -> Any:
        return FakeGroup(clock)

    options = Options(
        tmp_path / "out.jsonl", 60 * minutes, False, said.append, lambda group, s: {}, start, None
    )
    records = run_scenarios(scenarios, torch.device("cpu"), options)
    states = [record["state"] for record in records]
    no_time = [record for record in records if "no time was left" in str(record["why"])]
    measured = [record for record in records if record["state"] == "measured"]
    # the reference and one more in any case, and what had been begun
    unavoidable_s = 2 * (START_S + WARMUP_S) + 12 * ROUND_S
    assert clock.now - 1000 <= 60 * minutes + unavoidable_s
    assert set(states) <= {"measured", "skipped"} and len(measured) >= 2
    assert all(len(record["train"]["round_s"]) >= 1 for record in measured)
    assert bool(no_time) == (minutes < 8)
    few = [line for line in said if "the time was over" in line]
    assert len(few) == sum(len(record["train"]["round_s"]) < 3 for record in measured)
    # what was left out is measured by the next call
    again = run_scenarios(scenarios, torch.device("cpu"), replace(options, budget_s=3600.0))
    assert not [record for record in again if "no time was left" in str(record["why"])]
