"""What is measured, as data: every rung is a run that FGPT accepts, and a ladder is a ladder."""

from __future__ import annotations

from collections import Counter

import pytest

from fgpt.bench import job as job_module
from fgpt.bench.job import job_of, obstacle
from fgpt.bench.layouts import multi
from fgpt.bench.measure import relative, waves
from fgpt.bench.scenarios import LADDER, SLOW, single
from fgpt.bench.workloads import WORKLOADS

EVERYTHING = [*single(WORKLOADS, WORKLOADS, WORKLOADS), *multi(WORKLOADS["mini"], 8)]


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    monkeypatch.setattr(job_module, "multiplies_bf16", lambda device: True)
    return request.param


def test_every_rung_is_a_run_that_fgpt_accepts(device):
    seen = set()
    for scenario in EVERYTHING:
        if scenario.rung.device not in (None, device) or scenario.row.name.startswith("gpt2-"):
            continue
        resolved = job_of(scenario, device).resolved(device)  # raises ConfigError otherwise
        assert resolved.batch.world == scenario.rung.ranks
        assert resolved.precision in ("fp32", "bf16")
        run = resolved.to_json()["run"]
        for name, value in scenario.rung.sets.items():  # what makes it this rung has arrived
            section, field = name.split(".")
            assert run[section][field] == value, (scenario.rung.name, name)
        seen.add(scenario.rung.name)
    assert {"base", "best", "tp 2 x pp 2", "ZeRO-3 offload"} <= seen


def test_each_step_of_the_ladder_takes_one_thing_away_or_changes_the_json():
    for before, after in zip(LADDER, LADDER[1:], strict=False):
        gone = {n for n, v in before.sets.items() if after.sets.get(n) != v}
        new = {n for n, v in after.sets.items() if before.sets.get(n) != v}
        json, precision = before.json != after.json, before.precision != after.precision
        # `fused attention` says "fastest" where bf16 was asked for by name
        assert len(gone | new) + json + (precision and not gone) in (1, 2), after.name
    assert set(SLOW) <= set(LADDER[0].sets)
    (best,) = (rung for rung in LADDER if rung.name == "best")
    assert not best.sets  # nothing but FGPT's defaults


def test_names_are_unique_within_a_row():
    names = Counter((s.bench, s.row.name, s.rung.name) for s in EVERYTHING)
    assert set(names.values()) == {1}


@pytest.mark.parametrize("row", ["mini", "seed-9m", "gpt2"])
def test_scaling_keeps_the_batch_that_it_says(row):
    by_name = {s.rung.name: job_of(s, "cpu").resolved("cpu") for s in multi(WORKLOADS[row], 4)}
    whole = by_name["1 rank"].batch.global_size
    for name in ("2 ranks", "4 ranks", "ZeRO-1", "tp 2", "pp 2", "tp 2 x pp 2", "cp 2"):
        assert by_name[name].batch.global_size == whole, name
    share = by_name["1 rank, weak"].batch.global_size
    assert by_name["2 ranks, weak"].batch.global_size == 2 * share
    assert by_name["4 ranks, weak"].batch.global_size == 4 * share


def test_ranks_that_do_not_divide_the_batch_are_scaled_to_weakly_only():
    ranks = {
        section: [s.rung.ranks for s in multi(WORKLOADS["mini"], 3) if s.section == section]
        for section in ("strong", "weak")
    }
    assert ranks == {"strong": [2], "weak": [1, 2, 3]}
    assert {s.rung.ranks for s in multi(WORKLOADS["mini"], 1)} == {1}


def test_obstacles_are_said(monkeypatch):
    monkeypatch.setattr(job_module, "multiplies_bf16", lambda device: device == "cuda")
    why = {s.rung.name: obstacle(s, "cpu", 0) for s in single(["seed-1m"], [], [])}
    assert why["base"] is None and why["fused attention"] is None  # in fp32
    assert why["CUDA graphs"] == "no GPU"
    assert why["bf16"] == "this processor does not multiply bf16 itself"
    eight = {s.rung.name: obstacle(s, "cuda", 2) for s in multi(WORKLOADS["gpt2"], 4)}
    assert eight["4 ranks"] == "4 ranks, 2 GPU(s)"
    assert eight["2 ranks"] is None


def test_waves_hold_everything_once_and_the_reference_in_each():
    ladder = list(single(["seed-1m", "seed-9m"], [], []))
    for limit in (2, 3, 5, 100):
        cut = list(waves(ladder, limit))
        assert all(len(wave) <= limit for wave in cut)
        assert all(len({s.row for s in wave}) == 1 for wave in cut)
        assert all(wave[0].rung.name == "base" for wave in cut)
        others = Counter(s for wave in cut for s in wave[1:])
        assert set(others) == {s for s in ladder if s.rung.name != "base"}
        assert set(others.values()) == {1}
    assert list(waves(ladder, 1)) == [[s] for s in ladder]


def test_ratios_are_of_rounds_side_by_side():
    # the other's time over one's, round by round: 2, 1, 0.5
    assert relative([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == (1.0, 0.5, 2.0)
