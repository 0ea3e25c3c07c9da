"""After the last step: loss curves, a text sample, the summary."""

from __future__ import annotations

import json
import math
from typing import Any

from fgpt.data.token_dataset import BlendedDataset
from fgpt.engine.base import Engine
from fgpt.errors import TrainingError
from fgpt.model.count import n_params
from fgpt.report.run_record import Curves, read_curves
from fgpt.report.training_run import plot_loss, print_summary, summary_rows
from fgpt.train.decoding import sample_text
from fgpt.train.metrics import peak_memory_gib
from fgpt.train.run import describe_engine
from fgpt.train.startup import RunContext


def finish(
    context: RunContext, engine: Engine, data: BlendedDataset, saved_step: int | None
) -> None:
    """Write loss.png, sample.txt and summary.json, and print the summary. Collective."""
    sample = sample_text(context, engine, data) if context.resolved.run.sample.tokens else None
    if not context.world.is_rank0:
        return
    path = context.path
    try:
        curves = read_curves(path / "metrics.jsonl")
        if not curves.all_steps:
            context.print(f"{path}: no step was taken, nothing to report")
            return
        run_name = f"{context.resolved.run.model.preset} on {data.name}"
        plot_loss(curves, path / "loss.png", run_name)
        if sample is not None:
            (path / "sample.txt").write_text(sample[0] + sample[1])
        summary = _write_summary(context, engine, curves, saved_step)
    except OSError as error:
        raise TrainingError(
            f"the report was not written: {error}; the checkpoint of step {saved_step} was"
        ) from error
    print_summary(context.console, str(path), summary_rows(summary, path), sample)


def _write_summary(
    context: RunContext, engine: Engine, curves: Curves, saved_step: int | None
) -> dict[str, Any]:
    resolved, path = context.resolved, context.path
    run, batch = resolved.run, resolved.batch
    tokens = curves.all_steps * batch.global_size * resolved.seq_len
    checkpoint = (
        None if saved_step is None else str(path / "checkpoints" / f"step_{saved_step:08d}")
    )
    summary = {
        "model": run.model.preset,
        "parameters": n_params(run.model),
        "engine": describe_engine(resolved),
        "ranks": batch.world,
        "device": context.device.type,
        "steps": engine.step,
        "skipped_steps": engine.skipped_steps,
        "tokens": tokens,
        "train_s": curves.seconds,
        "tokens_per_s": tokens / curves.seconds,
        "train_loss": curves.losses[-1] if curves.losses else math.nan,
        "valid_loss_first": curves.valid_losses[0] if curves.valid_losses else None,
        "valid_loss": curves.valid_losses[-1] if curves.valid_losses else None,
        "peak_memory_gib": peak_memory_gib(context.device),
        "checkpoint": checkpoint,
    }
    (path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary
