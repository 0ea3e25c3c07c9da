"""Records: wrong losses are found, and ratios pair the rounds of a scenario and its reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fgpt.bench.job import Job, job_of
from fgpt.bench.measure import ScenarioRun
from fgpt.bench.scenario_record import key_of, latest_by_key, measured_record
from fgpt.bench.scenarios import WORKLOADS, single_device_scenarios

SCENARIOS = {s.variant.name: s for s in single_device_scenarios(["seed-1m"], [], [])}
ENVIRONMENT = {"source": "s", "hosts": None, "hardware": "h", "versions": {}}
PEAK = (0.5, "by hand")


def make_run(name="base", losses=(4.0, 3.0), seconds=1.0, batch=32, target="fgpt", peak=100):
    scenario = SCENARIOS[name]
    job = Job(**{**vars(job_of(scenario, "cpu")), "target": target, "precision": "fp32"})
    warmup = {
        "losses": list(losses),
        "setup_s": 1.0,
        "threads": 2,
        "grid": "world 1",
        "batches": {"train": 2, "predict": 4},
        "memory": {"peak_bytes": peak, "what": "by hand", "per_rank_bytes": [peak]},
        "config": {"batch": {"global_size": batch}},
    }
    rounds = {"train": [2 * seconds, 2 * seconds], "predict": [seconds, 2 * seconds]}
    return ScenarioRun(scenario, job, warmup, rounds)


def compare(run, reference):
    return measured_record(run, reference, ENVIRONMENT, PEAK)


def test_ratios_count_samples():
    fast = make_run("best", seconds=0.5, batch=64, peak=25)
    record = compare(fast, make_run())
    assert record["ratio"]["train"] == pytest.approx((4, 4, 4))  # half the time, twice the samples
    assert record["ratio_memory"] == 0.25
    assert record["loss_departure"] is None  # of other samples
    assert record["state"] == "measured"


def test_bf16_may_differ_by_a_tenth_of_the_fall():
    base = make_run(losses=(4.0, 3.6))  # falls by a tenth: the bound is 1 %
    for last, state in ((3.63, "measured"), (3.65, "wrong"), (4.0, "wrong")):
        half = make_run("best", (4.0, last))
        half.job = replace(half.job, precision="bf16")
        assert compare(half, base)["state"] == state


@pytest.mark.parametrize("losses", [(4.0, 3.001), (math.nan, 3.0), (4.0, math.inf)])
def test_differing_losses_are_wrong(losses):
    record = compare(make_run("best", losses), make_run())
    assert record["state"] == "wrong"
    assert "differ from the reference's" in record["why"]
    assert compare(make_run("best", (4.0, 3.0001)), make_run())["state"] == "measured"


def test_transformers_losses_are_not_compared():
    record = compare(make_run("best", (9.0, 9.0), target="transformers"), make_run())
    assert record["state"] == "measured" and record["loss_departure"] is None


def test_without_the_reference_nothing_is_compared():
    record = compare(make_run("best"), None)
    assert record["ratio"] is None and record["loss_departure"] is None
    broken = make_run("best")
    broken.failure = "out of memory"
    assert compare(broken, make_run())["state"] == "failed"


def test_keys_depend_on_code_machine_and_job():
    scenario, job = SCENARIOS["best"], job_of(SCENARIOS["best"], "cpu")
    key = key_of(scenario, job, ENVIRONMENT)
    assert key == key_of(scenario, job, dict(ENVIRONMENT))
    for change in ({"source": "d"}, {"hosts": {"a": 8}}, {"hardware": "i"}, {"versions": {"t": 1}}):
        assert key != key_of(scenario, job, {**ENVIRONMENT, **change})
    assert key != key_of(scenario, Job(**{**vars(job), "seq_len": 64}), ENVIRONMENT)
    assert key != key_of(SCENARIOS["base"], job, ENVIRONMENT)


def test_only_measured_records_count_as_done():
    records = [
        {"format": 1, "key": "a", "state": "measured", "n": 1},
        {"format": 1, "key": "a", "state": "measured", "n": 2},
        {"format": 1, "key": "b", "state": "failed"},
        {"format": 0, "key": "c", "state": "measured"},
        {"engine": "another bench's"},
    ]
    assert {key: r["n"] for key, r in latest_by_key(records).items()} == {"a": 2}


def test_workloads_are_presets():
    from fgpt.config.presets import PRESETS

    assert set(WORKLOADS) <= set(PRESETS)
