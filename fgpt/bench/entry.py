"""The record of a scenario: one JSON line with everything needed to repeat or to doubt it.

`FORMAT` changes when a field's meaning does; `fgpt report` reads these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fgpt.bench.job import Job
from fgpt.bench.measure import KINDS, Measured, relative
from fgpt.bench.scenarios import Scenario
from fgpt.config.presets import PRESETS
from fgpt.model.count import n_params, training_flops_per_token

FORMAT = 1
FP32_BOUND = 1e-4
"""Largest relative difference of the first steps' losses from the reference's, both in fp32."""
BF16_SHARE = 0.1
"""With bf16: what share of the reference's fall in those steps the losses may differ by. A rung
that learns half as fast differs by half of it.
"""


def key_of(scenario: Scenario, job: Job, environment: Mapping[str, Any]) -> str:
    """What must be equal for a record to be still true: job, code, machine, versions."""
    of = {name: environment.get(name) for name in ("source", "hardware", "hosts", "versions")}
    place = [scenario.bench, scenario.section, scenario.rung.name]
    text = json.dumps([FORMAT, place, asdict(job), of], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def heading(scenario: Scenario, job: Job, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a scenario before it is measured."""
    config = PRESETS[job.model]
    return {
        "format": FORMAT,
        "bench": scenario.bench,
        "row": scenario.row.name,
        "env_name": scenario.rung.name,
        "adds": scenario.rung.adds,
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


def skipped(
    scenario: Scenario, job: Job, environment: Mapping[str, Any], why: str, state: str = "skipped"
) -> dict[str, Any]:
    """The record of a scenario that was not measured here."""
    return {**heading(scenario, job, environment), "state": state, "why": why}


def entry(
    one: Measured,
    reference: Measured | None,
    environment: Mapping[str, Any],
    peak: tuple[float | None, str | None],
) -> dict[str, Any]:
    """The record of a measured scenario. `reference`: as measured with it, None if that failed;
    `peak`: TFLOP/s of what each rank has, and where the figure is from.
    """
    if one.why is not None:
        return skipped(one.scenario, one.job, environment, one.why, "failed")
    first, memory = one.first, one.first["memory"]
    bound = _bound(one, reference or one)
    departure = None if reference is None else _departure(one, reference)
    wrong = departure is not None and not departure <= bound
    peak_tflops, source = peak
    batch = first["config"]["batch"]
    return {
        **heading(one.scenario, one.job, {**environment, "threads": first["threads"]}),
        "state": "wrong" if wrong else "measured",
        "why": f"its losses depart by {departure:.1e}, bound {bound:.0e}" if wrong else None,
        "grid": first["grid"],
        "global_batch": batch["global_size"],
        **{k: {"round_s": one.round_s[k], "batches": first["batches"][k]} for k in KINDS},
        "ratio": None if reference is None else _ratios(one, reference),
        "ratio_memory": None if reference is None else _peak(one) / _peak(reference),
        "memory": memory,
        "losses": first["losses"],
        "loss_departure": departure,
        "loss_bound": bound,
        "peak_tflops": peak_tflops,
        "peak_source": source,
        "setup_s": first["setup_s"],
        "shares": one.more.get("shares"),
        "sent_bytes": one.more.get("sent_bytes"),
        "trace": one.more.get("trace"),
        "extras_failed": one.more.get("extras"),
        "config": first["config"],
    }


def _ratios(one: Measured, reference: Measured) -> dict[str, tuple[float, float, float]]:
    """Speeds in samples, round by round: the two may have other batches."""
    return {kind: relative(_sample_s(one, kind), _sample_s(reference, kind)) for kind in KINDS}


def _peak(one: Measured) -> int:
    """Bytes on the rank that needs most."""
    return max(one.first["memory"]["per_rank_bytes"])


def _sample_s(one: Measured, kind: str) -> list[float]:
    batch = one.first["config"]["batch"]["global_size"]
    return [seconds / batch for seconds in one.batch_s(kind)]


def _bound(one: Measured, reference: Measured) -> float:
    """Of `_departure`."""
    if {one.job.precision, reference.job.precision} == {"fp32"}:
        return FP32_BOUND
    first, *_, last = reference.first["losses"]
    return max(FP32_BOUND, BF16_SHARE * abs(first - last) / abs(first))


def _departure(one: Measured, reference: Measured) -> float | None:
    """Largest relative difference of the losses; None where they are not of the same samples and
    weights: another global batch, the peer's own initial values.
    """
    batches = [m.first["config"]["batch"]["global_size"] for m in (one, reference)]
    if batches[0] != batches[1] or {one.job.subject, reference.job.subject} != {"fgpt"}:
        return None
    pairs = zip(one.first["losses"], reference.first["losses"], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def latest(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Key -> its last record; what was skipped or failed is left out, to be tried again."""
    done = ("measured", "wrong")
    return {r["key"]: r for r in records if r.get("format") == FORMAT and r.get("state") in done}
