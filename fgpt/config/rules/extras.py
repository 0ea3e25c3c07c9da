"""Rules about activation checkpointing, monitors and profilers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fgpt.config.rules.context import Context, Finding, Rule
from fgpt.config.rules.grid import sound_batch

_BLOCK = "activation_checkpointing"


def _partition(ctx: Context) -> Iterator[Finding]:
    path = f"{_BLOCK}.partition_activations"
    if ctx.ds(path) and ctx.run("parallel.tp") == 1:
        yield Finding(f"deepspeed.{path}", "true with tp 1")


def _partition_sequence(ctx: Context) -> Iterator[Finding]:
    path = f"{_BLOCK}.partition_activations"
    if ctx.ds(path) and ctx.run("parallel.sequence"):
        yield Finding(f"deepspeed.{path}", "true with parallel.sequence true")


def _partition_evenly(ctx: Context) -> Iterator[Finding]:
    path, tp = f"{_BLOCK}.partition_activations", ctx.run("parallel.tp")
    batch = sound_batch(ctx)
    if not ctx.ds(path) or batch is None:
        return
    tokens, width = ctx.run("data.seq_len") // batch.cp, ctx.run("model.d_model")
    if batch.micro * tokens * width % tp:
        what = f"micro batch {batch.micro} x {tokens} tokens x d_model {width} is not a multiple of"
        yield Finding(f"deepspeed.{path}", f"{what} tp {tp}")


def _contiguous(ctx: Context) -> Iterator[Finding]:
    path = f"{_BLOCK}.contiguous_memory_optimization"
    if ctx.ds(path) and not ctx.ds(f"{_BLOCK}.partition_activations"):
        yield Finding(f"deepspeed.{path}", "true without partition_activations")
    if ctx.ds(path) and ctx.ds(f"{_BLOCK}.number_checkpoints") is None:
        yield Finding(f"deepspeed.{path}", "true without number_checkpoints")


def _contiguous_in_pipeline(ctx: Context) -> Iterator[Finding]:
    path, pp = f"{_BLOCK}.contiguous_memory_optimization", ctx.run("parallel.pp")
    if ctx.ds(path) and pp > 1:
        yield Finding(f"deepspeed.{path}", f"true with pp {pp}")


def _on_cpu(ctx: Context) -> Iterator[Finding]:
    for name in ("cpu_checkpointing", "synchronize_checkpoint_boundary"):
        if ctx.device == "cpu" and ctx.ds(f"{_BLOCK}.{name}"):
            yield Finding(f"deepspeed.{_BLOCK}.{name}", "true on a CPU")


def _segments(ctx: Context) -> Iterator[Finding]:
    path, layers = f"{_BLOCK}.number_checkpoints", ctx.run("model.n_layer")
    segments = ctx.ds(path)
    if segments is not None and layers % segments:
        yield Finding(f"deepspeed.{path}", f"{segments} does not divide n_layer {layers}")


def _package(ctx: Context) -> Iterator[Finding]:
    for name in ("tensorboard", "wandb"):
        if ctx.ds(f"{name}.enabled") and name not in ctx.packages:
            what = f"true, but the package {name} is not installed"
            yield Finding(f"deepspeed.{name}.enabled", what, f"pip install 'fgpt[{name}]'")


def _silent_log(ctx: Context) -> Iterator[Finding]:
    if ctx.ds("comms_logger.enabled") and not ctx.ds("comms_logger.verbose"):
        yield Finding("deepspeed.comms_logger.enabled", "true with verbose false")


def _late_profile(ctx: Context) -> Iterator[Finding]:
    step, steps = ctx.ds("flops_profiler.profile_step"), ctx.run("train.steps")
    if ctx.ds("flops_profiler.enabled") and step >= steps:
        yield Finding("deepspeed.flops_profiler.profile_step", f"{step} of {steps} steps")


def _run_dir_name(ctx: Context) -> Iterator[Finding]:
    run_dir = str(ctx.run("run_dir"))
    if Path(run_dir).name in ("", "..") or set(run_dir) & set("[]*?"):
        yield Finding("run.run_dir", repr(run_dir))


RULES = (
    Rule(
        "run-dir-name",
        "A run has its own directory, and in its path DeepSpeed takes [, ], * and ? for patterns.",
        "name a directory without these characters",
        _run_dir_name,
    ),
    Rule(
        "partition-activations",
        "Activations are partitioned over the tensor-parallel ranks; with tp 1 there are none.",
        "delete it",
        _partition,
    ),
    Rule(
        "partition-sequence",
        "With parallel.sequence the tensor-parallel ranks hold different tokens already; DeepSpeed"
        " would put an activation together from parts of different ones.",
        "delete it",
        _partition_sequence,
    ),
    Rule(
        "partition-evenly",
        "DeepSpeed asserts that the input of a block divides evenly over the tensor-parallel"
        " ranks.",
        "delete it, or change the micro batch",
        _partition_evenly,
    ),
    Rule(
        "contiguous-checkpoints",
        "DeepSpeed asserts that contiguous memory goes with partitioned activations and a number"
        " of checkpoints.",
        "delete it",
        _contiguous,
    ),
    Rule(
        "contiguous-in-pipeline",
        "DeepSpeed sizes these buffers for one pass through all blocks; a pipeline stage has"
        " several micro batches in flight and can run out of them.",
        "delete it",
        _contiguous_in_pipeline,
    ),
    Rule(
        "checkpointing-on-cpu",
        "Activations of a CPU run are in CPU memory already, and there is no device to wait for.",
        "delete it",
        _on_cpu,
    ),
    Rule(
        "number-checkpoints",
        "number_checkpoints is the number of equal groups of blocks that are recomputed; null:"
        " each block.",
        "choose a divisor of n_layer, or delete it",
        _segments,
    ),
    Rule(
        "monitor-package",
        "The monitor needs an optional package.",
        "install it, or turn the monitor off",
        _package,
    ),
    Rule(
        "comms-logger-silent",
        "Without verbose DeepSpeed collects communication times that nobody prints.",
        'write "verbose": true',
        _silent_log,
    ),
    Rule(
        "profile-after-end",
        "The profiler would wait for a step that the run does not reach.",
        "choose a step within train.steps",
        _late_profile,
    ),
)
