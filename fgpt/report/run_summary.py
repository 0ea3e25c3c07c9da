"""The numbers of a training run by which one compares it with others."""

from __future__ import annotations

import statistics

from fgpt.report.run_record import RunRecord, is_number


def describe(run: RunRecord) -> str:
    """Model, engine, precision and ranks in words."""
    batch = run.section("batch")
    is_plain = run.section("run", "train").get("engine") == "plain"
    engine = "plain engine" if is_plain else f"ZeRO-{run.config.get('zero_stage', '?')}"
    grid = "".join(
        f", {axis} {batch[axis]}" for axis in ("tp", "pp", "cp") if batch.get(axis, 1) != 1
    )
    where = f"{batch.get('world', '?')} rank(s) on {run.config.get('device', '?')}"
    return f"{run.model}, {engine}, {run.config.get('precision', '?')}{grid}, {where}"


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def summary_of(run: RunRecord) -> dict[str, str]:
    """Name -> text, of the numbers that one compares runs by."""
    steps, losses = run.records.steps, [loss for _, loss in run.records.evaluations]
    rows = {"model": describe(run), "state": run.state}
    last = steps[-1]["step"] if steps else 0
    rows["steps"] = f"{last:,}" + (f" of {run.last_step:,}" if run.last_step else "")
    rows["tokens"] = f"{run.tokens(last):,}"
    rows["time of steps"] = duration(sum(record["step_s"] for record in steps))
    trained = [record for record in steps if not record["skipped"]]
    if trained:
        rows["training loss"] = f"{trained[-1]['loss']:.4f}"
    if losses:
        best = min(run.records.evaluations, key=lambda pair: pair[1])
        rows["validation loss"] = f"{losses[-1]:.4f}"
        rows["lowest validation loss"] = f"{best[1]:.4f} at step {best[0]:,}"
    speeds = [r["tokens_per_s"] for r in steps if is_number(r.get("tokens_per_s"))]
    if speeds:
        rows["throughput, median"] = f"{statistics.median(speeds):,.0f} tokens/s"
    memory = [r["memory_gib"] for r in steps if is_number(r.get("memory_gib"))]
    if memory:
        rows["peak memory"] = f"{max(memory):.2f} GiB (rank 0)"
    waits = [r["data_wait_s"] for r in steps if is_number(r.get("data_wait_s"))]
    if waits:
        total_s = sum(record["step_s"] for record in steps) or 1
        rows["waiting for data"] = f"{sum(waits) / total_s:.1%}"
    rows["skipped steps"] = f"{sum(record['skipped'] for record in steps):,}"
    return rows
