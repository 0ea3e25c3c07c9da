"""The scenarios: FGPT accepts every variant, and each ladder step changes one thing."""

from __future__ import annotations

from collections import Counter

import pytest

from fgpt.bench import job as job_module
from fgpt.bench.job import job_of, skip_reason
from fgpt.bench.measure import relative_speed, split_into_cohorts
from fgpt.bench.scenarios import (
    LADDER,
    UNOPTIMIZED,
    WORKLOADS,
    multi_rank_scenarios,
    scenario_flags,
    single_device_scenarios,
)

EVERYTHING = [
    *single_device_scenarios(WORKLOADS, WORKLOADS, WORKLOADS),
    *multi_rank_scenarios(WORKLOADS["mini"], 8),
]


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    monkeypatch.setattr(job_module, "multiplies_bf16", lambda device: True)
    return request.param


def test_every_variant_is_accepted(device):
    seen = set()
    for scenario in EVERYTHING:
        if scenario.variant.device not in (None, device) or scenario.workload.name.startswith(
            "gpt2-"
        ):
            continue
        resolved = job_of(scenario, device).resolved(device)  # raises ConfigError otherwise
        assert resolved.batch.world == scenario.variant.ranks
        assert resolved.precision in ("fp32", "bf16")
        run = resolved.to_json()["run"]
        for name, value in scenario.variant.overrides.items():  # the overrides have effect
            section, field = name.split(".")
            assert run[section][field] == value, (scenario.variant.name, name)
        seen.add(scenario.variant.name)
    assert {"base", "best", "tp 2 x pp 2", "ZeRO-3 offload"} <= seen


def test_each_ladder_step_changes_one_thing():
    for before, after in zip(LADDER, LADDER[1:], strict=False):
        gone = {n for n, v in before.overrides.items() if after.overrides.get(n) != v}
        new = {n for n, v in after.overrides.items() if before.overrides.get(n) != v}
        json, precision = before.ds_config != after.ds_config, before.precision != after.precision
        # from `bf16` to `fused attention` the precision changes by name only
        assert len(gone | new) + json + (precision and not gone) in (1, 2), after.name
    assert set(UNOPTIMIZED) <= set(LADDER[0].overrides)
    (best,) = (variant for variant in LADDER if variant.name == "best")
    assert not best.overrides  # nothing but FGPT's defaults


def test_each_scenario_has_a_name_of_its_own():
    """`fgpt bench NAME` and `make bench-NAME`."""
    flags = scenario_flags()
    assert {"zero0", "zero2", "zero2-offload", "tp2", "tp2-pp2", "gpt2", "fused-attention"} <= {
        *flags
    }
    assert flags["tp2-sequence"] == ("multi", "--only", "tp 2, sequence")
    assert flags["bf16"] == ("single", "--only", "bf16")
    assert flags["seed-9m"] == ("single", "--rows", "seed-9m")
    reached = {(bench, name) for bench, flag, name in flags.values() if flag == "--only"}
    of_layouts = {"ZeRO-2", "ZeRO-3", "ZeRO-2 offload"}  # the same names on one device
    for scenario in EVERYTHING:
        if scenario.section not in ("strong", "weak") and scenario.variant.name != "1 rank":
            bench = "multi" if scenario.variant.name in of_layouts else scenario.bench
            assert (bench, scenario.variant.name) in reached


def test_names_are_unique_within_a_workload():
    names = Counter((s.bench, s.workload.name, s.variant.name) for s in EVERYTHING)
    assert set(names.values()) == {1}


@pytest.mark.parametrize("workload", ["mini", "seed-9m", "gpt2"])
def test_scaling_keeps_the_global_batch(workload):
    by_name = {
        s.variant.name: job_of(s, "cpu").resolved("cpu")
        for s in multi_rank_scenarios(WORKLOADS[workload], 4)
    }
    whole = by_name["1 rank"].batch.global_size
    for name in ("2 ranks", "4 ranks", "ZeRO-1", "tp 2", "pp 2", "tp 2 x pp 2", "cp 2"):
        assert by_name[name].batch.global_size == whole, name
    share = by_name["1 rank, weak"].batch.global_size
    assert by_name["2 ranks, weak"].batch.global_size == 2 * share
    assert by_name["4 ranks, weak"].batch.global_size == 4 * share


def test_ranks_that_do_not_divide_the_batch_scale_only_weakly():
    ranks = {
        section: [
            s.variant.ranks
            for s in multi_rank_scenarios(WORKLOADS["mini"], 3)
            if s.section == section
        ]
        for section in ("strong", "weak")
    }
    assert ranks == {"strong": [2], "weak": [1, 2, 3]}
    assert {s.variant.ranks for s in multi_rank_scenarios(WORKLOADS["mini"], 1)} == {1}


def test_obstacles(monkeypatch):
    monkeypatch.setattr(job_module, "multiplies_bf16", lambda device: device == "cuda")
    why = {
        s.variant.name: skip_reason(s, "cpu", 0)
        for s in single_device_scenarios(["seed-1m"], [], [])
    }
    assert why["base"] is None and why["fused attention"] is None  # in fp32
    assert why["CUDA graphs"] == "no GPU"
    assert why["bf16"] == "this processor has no native bf16"
    eight = {
        s.variant.name: skip_reason(s, "cuda", 2)
        for s in multi_rank_scenarios(WORKLOADS["gpt2"], 4)
    }
    assert eight["4 ranks"] == "4 ranks, 2 GPU(s)"
    assert eight["2 ranks"] is None


def test_cohorts_hold_every_scenario_once_and_begin_with_the_reference():
    ladder = list(single_device_scenarios(["seed-1m", "seed-9m"], [], []))
    for limit in (2, 3, 5, 100):
        cohorts = list(split_into_cohorts(ladder, limit))
        assert all(len(cohort) <= limit for cohort in cohorts)
        assert all(len({s.workload for s in cohort}) == 1 for cohort in cohorts)
        assert all(cohort[0].variant.name == "base" for cohort in cohorts)
        others = Counter(s for cohort in cohorts for s in cohort[1:])
        assert set(others) == {s for s in ladder if s.variant.name != "base"}
        assert set(others.values()) == {1}
    assert list(split_into_cohorts(ladder, 1)) == [[s] for s in ladder]


def test_ratios_pair_the_rounds():
    # reference / own time, round by round: 2, 1, 0.5
    assert relative_speed([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == (1.0, 0.5, 2.0)
