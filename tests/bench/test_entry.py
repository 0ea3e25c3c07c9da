"""Records: a fast step that computes something else is a fault, and what is compared is paired."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fgpt.bench.entry import entry, key_of, latest
from fgpt.bench.job import Job, job_of
from fgpt.bench.measure import Measured
from fgpt.bench.scenarios import single
from fgpt.bench.workloads import WORKLOADS

SCENARIOS = {s.rung.name: s for s in single(["seed-1m"], [], [])}
ENVIRONMENT = {"source": "s", "hosts": None, "hardware": "h", "versions": {}}
PEAK = (0.5, "by hand")


def measured(name="base", losses=(4.0, 3.0), seconds=1.0, batch=32, subject="fgpt", peak=100):
    scenario = SCENARIOS[name]
    job = Job(**{**vars(job_of(scenario, "cpu")), "subject": subject, "precision": "fp32"})
    first = {
        "losses": list(losses),
        "setup_s": 1.0,
        "threads": 2,
        "grid": "world 1",
        "batches": {"train": 2, "predict": 4},
        "memory": {"peak_bytes": peak, "what": "by hand", "per_rank_bytes": [peak]},
        "config": {"batch": {"global_size": batch}},
    }
    rounds = {"train": [2 * seconds, 2 * seconds], "predict": [seconds, 2 * seconds]}
    return Measured(scenario, job, first, rounds)


def made(one, reference):
    return entry(one, reference, ENVIRONMENT, PEAK)


def test_ratios_count_samples():
    fast = measured("best", seconds=0.5, batch=64, peak=25)
    record = made(fast, measured())
    assert record["ratio"]["train"] == pytest.approx((4, 4, 4))  # half the time, twice the samples
    assert record["ratio_memory"] == 0.25
    assert record["loss_departure"] is None  # of other samples
    assert record["state"] == "measured"


def test_bf16_may_depart_by_a_tenth_of_the_fall():
    base = measured(losses=(4.0, 3.6))  # falls by a tenth: 1 % may be departed by
    for last, state in ((3.63, "measured"), (3.65, "wrong"), (4.0, "wrong")):
        half = measured("best", (4.0, last))
        half.job = replace(half.job, precision="bf16")
        assert made(half, base)["state"] == state


@pytest.mark.parametrize("losses", [(4.0, 3.001), (math.nan, 3.0), (4.0, math.inf)])
def test_departing_losses_are_wrong(losses):
    record = made(measured("best", losses), measured())
    assert record["state"] == "wrong"
    assert "depart" in record["why"]
    assert made(measured("best", (4.0, 3.0001)), measured())["state"] == "measured"


def test_the_peers_losses_are_its_own():
    record = made(measured("best", (9.0, 9.0), subject="transformers"), measured())
    assert record["state"] == "measured" and record["loss_departure"] is None


def test_without_the_reference_nothing_is_compared():
    record = made(measured("best"), None)
    assert record["ratio"] is None and record["loss_departure"] is None
    broken = measured("best")
    broken.why = "out of memory"
    assert made(broken, measured())["state"] == "failed"


def test_keys_change_with_what_would_change_the_figures():
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
    assert {key: r["n"] for key, r in latest(records).items()} == {"a": 2}


def test_rows_are_presets():
    from fgpt.config.presets import PRESETS

    assert set(WORKLOADS) <= set(PRESETS)
