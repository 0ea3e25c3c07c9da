"""Prints a resolved configuration: batch, values with their origins, and DeepSpeed's changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fgpt.config.deepspeed.settings import leaf_values
from fgpt.config.field_syntax import parse_stages
from fgpt.config.resolve import Resolved
from fgpt.config.run_file import to_dict
from fgpt.config.schema import ScheduleConfig
from fgpt.optim.optimizers import adam_rate, peak_rate
from fgpt.utils.keys import shown


def render(resolved: Resolved, console: Console) -> None:
    """Print the configuration as `fgpt check` does."""
    zero = f"ZeRO-{resolved.zero_stage}"
    engine = "plain engine" if resolved.run.train.engine == "plain" else f"DeepSpeed {zero}"
    console.print(f"[bold]{engine}, {resolved.precision}, {resolved.device}[/bold]")
    console.print(Text(resolved.batch.explain()))
    tokens = resolved.batch.global_size * resolved.seq_len
    steps = resolved.run.train.steps
    total = resolved.ramp.samples_before(steps) * resolved.seq_len
    console.print(
        f"{tokens} tokens per step = global batch {resolved.batch.global_size} x seq_len "
        f"{resolved.seq_len}; {total} in {steps} steps"
    )
    if resolved.run.train.batch_ramp is not None:
        console.print(f"global batch: {resolved.ramp.explain()}")
    stages = resolved.run.data.stages
    for stage in [] if stages is None else parse_stages(stages):
        console.print(Text(f"data from {stage.tokens:,.0f} tokens on: {stage.path}"))
    for name, text in facts(resolved):
        console.print(Text(f"{name}: {text}"), soft_wrap=True)
    for issue in resolved.issues:
        console.print(Text(f"{issue.grade}: {issue}"), soft_wrap=True)
    console.print(_table("run file", "run", to_dict(resolved.run), resolved.origins))
    console.print(_table("DeepSpeed JSON", "deepspeed", resolved.deepspeed, resolved.origins))
    if resolved.engine_changes:
        console.print(_changes(resolved))
    console.print(f"fingerprint {resolved.fingerprint()}")


def facts(resolved: Resolved) -> Iterator[tuple[str, str]]:
    """(name, one line) of what users of a DeepSpeed JSON ask first."""
    settings, run = resolved.settings, resolved.run
    section = settings.checkpointing
    if section is None:
        yield "recompute", "off; no activation_checkpointing asks for it"
    else:
        groups = section.get("number_checkpoints")
        blocks = "each block" if groups is None else f"blocks in groups, {groups} of them"
        yield (
            "recompute",
            f"{blocks} (activation_checkpointing), speed.recompute {run.speed.recompute}",
        )
    rates, kind = _rates_text(settings.optimizer_params), settings.written("scheduler.type")
    params = settings.written("scheduler.params") or {}
    text = f"{'constant' if kind is None else kind}, {rates}"
    if "warmup_num_steps" in params:
        total = params.get("total_num_steps", run.train.steps)
        text += f", warm-up {params['warmup_num_steps']} of {total} steps"
    if run.schedule.kind != "deepspeed":
        text = f"{schedule_text(run.schedule)}; peak {rates}"
    yield "schedule", text
    clip = settings.get("gradient_clipping")
    by = "FGPT" if resolved.clips_in_fgpt else "DeepSpeed"
    yield "clipping", f"to norm {clip:g}, by {by}" if clip else "off"
    origins = resolved.origins
    switch = "fp16" if resolved.precision == "fp16" else "bf16"
    if settings.get("torch_autocast.enabled"):
        switch = "torch_autocast"
    key = f"{switch}.enabled"
    how = origins.get(f"deepspeed.{key}")
    by = f"by {key} ({how})" if how else "neither bf16 nor fp16 is written"
    yield "precision", f"{settings.precision_text}, {by}"
    stage = resolved.engine_settings.zero_stage
    reason = f" ({origins['deepspeed.zero_optimization.stage']})"
    for change in resolved.engine_changes:
        if change.key == "zero_optimization.stage":
            reason = f" instead of {change.user}: {change.reason}"
    yield "ZeRO stage", f"{stage}{reason}"


def _rates_text(params: Mapping[str, Any]) -> str:
    """The learning rate of these optimizer.params; Muon may have two."""
    peak, other = peak_rate(params), adam_rate(params)
    if "muon_lr" not in params and peak == other:
        return f"optimizer.params.lr {peak:g}"
    return f"muon_lr {peak:g} of the matrices of blocks, adam_lr {other:g} of the rest"


def schedule_text(schedule: ScheduleConfig) -> str:
    """The parts of a resolved run-file schedule with their steps: wsd, 50 warm-up, 270 ..."""
    warmup, decay, total = schedule.warmup_steps, schedule.decay_steps, schedule.total_steps
    assert warmup is not None and decay is not None and total is not None  # resolved
    text = f"{schedule.kind}, {warmup} warm-up"
    if constant := total - warmup - decay:
        text += f", {constant} constant"
    if decay:
        text += f", {decay} decay ({schedule.decay_shape}) to {schedule.min_ratio:g} of the peak"
    if steps := schedule.momentum_warmup_steps:
        text += f"; momentum from {schedule.momentum_start:g} in {steps} steps"
    if schedule.weight_decay != "constant":
        text += f"; weight decay {schedule.weight_decay}"
    return f"{text}; {total} steps"


def _table(title: str, root: str, values: Mapping[str, Any], origins: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("key", "value", "origin"):
        table.add_column(column, overflow="fold")
    for path, value in leaf_values(values):
        origin = origins.get(f"{root}.{path}", "default")
        style = "dim" if origin == "default" else ""
        table.add_row(*(Text(cell) for cell in (path, shown(value), origin)), style=style)
    return table


def _changes(resolved: Resolved) -> Table:
    title = "changed for DeepSpeed"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("key", "value", "for DeepSpeed", "reason"):
        table.add_column(column, overflow="fold")
    for key, user, engine, reason in resolved.engine_changes:
        cells = ("absent" if value is None else shown(value) for value in (user, engine))
        table.add_row(*(Text(cell) for cell in (key, *cells, reason)))
    return table
