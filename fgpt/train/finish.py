"""After the last step: loss curves, a text sample, the summary."""

from __future__ import annotations

import json
import math
from typing import Any

from fgpt.data.token_dataset import BlendedDataset
from fgpt.engine.base import Engine
from fgpt.errors import LostRankError, TrainingError
from fgpt.model.count import n_params
from fgpt.report.run_record import METRICS, Curves, Sample, read_metrics
from fgpt.report.training_run import plot_loss, print_summary, summary_rows
from fgpt.train.decoding import keep_sample, sample_text
from fgpt.train.metrics import peak_memory_gib
from fgpt.train.startup import RunContext, describe_engine
from fgpt.utils.files import write_atomic


def last_sample(context: RunContext, engine: Engine, data: BlendedDataset) -> Sample | None:
    """The text at the end of a run, on rank 0; None if `sample.tokens` is 0. Collective."""
    if not context.resolved.run.sample.tokens:
        return None
    try:
        return sample_text(context, engine, data)
    except LostRankError:
        raise
    except TrainingError as error:
        context.print(f"step {engine.step}: no sample: {error}", "bold red")
        return None


def finish(
    context: RunContext,
    engine: Engine,
    data_name: str,
    sample: Sample | None,
    saved_step: int | None,
) -> None:
    """Write loss.png, sample.txt and summary.json, and print the summary, on rank 0.

    Raises TrainingError if they cannot be written.
    """
    if not context.world.is_rank0:
        return
    path = context.path
    try:
        curves = read_metrics(path / METRICS).curves()
        if not curves.all_steps:
            context.print(f"{path}: no step was taken, nothing to report")
            return
        plot_loss(curves, path / "loss.png", f"{context.resolved.run.model.preset} on {data_name}")
        if sample is not None:
            text = sample.prompt + sample.text
            write_atomic(path / "sample.txt", text.encode(errors="backslashreplace"))
            keep_sample(context, sample)
        summary = _write_summary(context, engine, curves, saved_step)
    except OSError as error:
        raise TrainingError(
            f"the report was not written: {error}; the checkpoint of step {saved_step} was"
        ) from error
    texts = None if sample is None else (sample.prompt, sample.text)
    print_summary(context.console, str(path), summary_rows(summary, path), texts)


def _write_summary(
    context: RunContext, engine: Engine, curves: Curves, saved_step: int | None
) -> dict[str, Any]:
    resolved, path = context.resolved, context.path
    run, batch = resolved.run, resolved.batch
    before = resolved.ramp.samples_before
    tokens = (before(engine.step) - before(engine.step - curves.all_steps)) * resolved.seq_len
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
    write_atomic(path / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    return summary
