"""The JSON record of a scenario, and its comparison with the reference.

`fgpt report` reads these records; `FORMAT` changes when the meaning of a key does.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fgpt.bench.job import Job
from fgpt.bench.measure import KINDS, ScenarioRun, relative_speed
from fgpt.bench.scenarios import Scenario
from fgpt.config.presets import PRESETS
from fgpt.model.count import n_params, training_flops_per_token

FORMAT = 1
FP32_BOUND = 1e-4
"""Largest relative difference of the warmup losses from the reference's, both in fp32."""
BF16_SHARE = 0.1
"""With bf16: the largest difference, as a fraction of the reference's fall in these steps. A
variant that learns half as fast differs by half of it.
"""
_KEY_NAMES = {"ds_config": "json", "overrides": "sets", "target": "subject"}
"""Fields of `Job` under the names that they have in the keys of old records."""


def key_of(scenario: Scenario, job: Job, environment: Mapping[str, Any]) -> str:
    """Hash of everything that a record depends on: job, code, machine, versions."""
    job_fields = {_KEY_NAMES.get(name, name): value for name, value in asdict(job).items()}
    names = ("source", "hardware", "hosts", "versions")
    machine = {name: environment.get(name) for name in names}
    place = [scenario.bench, scenario.section, scenario.variant.name]
    text = json.dumps([FORMAT, place, job_fields, machine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def unmeasured_record(
    scenario: Scenario, job: Job, environment: Mapping[str, Any], why: str, state: str = "skipped"
) -> dict[str, Any]:
    """The record of a scenario without measurements; `state`: "skipped" or "failed"."""
    return {**_common_keys(scenario, job, environment), "state": state, "why": why}


def measured_record(
    run: ScenarioRun,
    reference: ScenarioRun | None,
    environment: Mapping[str, Any],
    peak: tuple[float | None, str | None],
) -> dict[str, Any]:
    """The record of a scenario that was run; "failed" without measurements if the run failed.

    `reference`: its run in the same cohort, None if that failed; `peak`: TFLOP/s per rank, and the
    source of that figure.
    """
    if run.failure is not None:
        return unmeasured_record(run.scenario, run.job, environment, run.failure, "failed")
    warmup, config = run.warmup, run.warmup["config"]
    bound = _loss_bound(run, reference or run)
    difference = None if reference is None else _loss_difference(run, reference)
    is_wrong = difference is not None and not difference <= bound  # NaN is wrong
    why = None
    if is_wrong:
        why = f"its losses differ from the reference's by {difference:.1e}, bound {bound:.0e}"
    return {
        **_common_keys(run.scenario, run.job, {**environment, "threads": warmup["threads"]}),
        "state": "wrong" if is_wrong else "measured",
        "why": why,
        "grid": warmup["grid"],
        "global_batch": config["batch"]["global_size"],
        **{k: {"round_s": run.round_s[k], "batches": warmup["batches"][k]} for k in KINDS},
        "ratio": None if reference is None else _speed_ratios(run, reference),
        "ratio_memory": None if reference is None else _peak(run) / _peak(reference),
        "memory": warmup["memory"],
        "losses": warmup["losses"],
        "loss_departure": difference,
        "loss_bound": bound,
        "peak_tflops": peak[0],
        "peak_source": peak[1],
        "setup_s": warmup["setup_s"],
        "shares": run.details.get("shares"),
        "sent_bytes": run.details.get("sent_bytes"),
        "trace": run.details.get("trace"),
        "extras_failed": run.details.get("extras"),
        "config": config,
    }


def run_of_record(scenario: Scenario, job: Job, record: Mapping[str, Any]) -> ScenarioRun:
    """The run that a record describes, for use as a reference."""
    warmup = {name: record[name] for name in ("memory", "losses", "config", "grid", "setup_s")}
    warmup["batches"] = {kind: record[kind]["batches"] for kind in KINDS}
    round_s = {kind: list(record[kind]["round_s"]) for kind in KINDS}
    return ScenarioRun(scenario, job, warmup, round_s)


def latest_by_key(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Key -> its last measured record; skipped and failed scenarios are tried again."""
    done = ("measured", "wrong")
    return {r["key"]: r for r in records if r.get("format") == FORMAT and r.get("state") in done}


def samples_per_s(record: Mapping[str, Any], kind: str) -> float:
    """Median over the rounds."""
    rounds = record[kind]
    return record["global_batch"] * rounds["batches"] / statistics.median(rounds["round_s"])


def _common_keys(scenario: Scenario, job: Job, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that does not depend on measurements."""
    config = PRESETS[job.model]
    return {
        "format": FORMAT,
        "bench": scenario.bench,
        "row": scenario.workload.name,
        "env_name": scenario.variant.name,
        "adds": scenario.variant.description,
        "section": scenario.section,
        "order": list(scenario.order),
        "reference": scenario.reference,
        "parameters": n_params(config),
        "ranks": job.ranks,
        "micro_batch": job.micro_batch,
        "seq_len": job.seq_len,
        "precision": job.precision,
        "flops_per_token": training_flops_per_token(config, job.seq_len),
        "key": key_of(scenario, job, environment),
        "environment": dict(environment),
    }


def _global_batch(run: ScenarioRun) -> int:
    return int(run.warmup["config"]["batch"]["global_size"])


def _speed_ratios(
    run: ScenarioRun, reference: ScenarioRun
) -> dict[str, tuple[float, float, float]]:
    """Relative speed in samples: the global batches may differ."""

    def sample_s(of: ScenarioRun, kind: str) -> list[float]:
        return [seconds / _global_batch(of) for seconds in of.batch_s(kind)]

    return {kind: relative_speed(sample_s(run, kind), sample_s(reference, kind)) for kind in KINDS}


def _peak(run: ScenarioRun) -> int:
    """Peak bytes of the rank that needs most."""
    return max(run.warmup["memory"]["per_rank_bytes"])


def _loss_bound(run: ScenarioRun, reference: ScenarioRun) -> float:
    """The largest accepted `_loss_difference`."""
    if {run.job.precision, reference.job.precision} == {"fp32"}:
        return FP32_BOUND
    first, *_, last = reference.warmup["losses"]
    return max(FP32_BOUND, BF16_SHARE * abs(first - last) / abs(first))


def _loss_difference(run: ScenarioRun, reference: ScenarioRun) -> float | None:
    """Largest relative difference of the warmup losses.

    None if they are not comparable: another global batch, or transformers' own initial weights.
    """
    targets = {run.job.target, reference.job.target}
    if _global_batch(run) != _global_batch(reference) or targets != {"fgpt"}:
        return None
    pairs = zip(run.warmup["losses"], reference.warmup["losses"], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)
