"""Rules about keys without effect, activation checkpointing, monitors and profilers."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.config.deepspeed.settings import CHECKPOINTING, walk
from fgpt.config.rules import Context, Finding, Rule
from fgpt.config.rules.layout import valid_batch
from fgpt.utils.keys import shown


def _refused(ctx: Context) -> Iterator[Finding]:
    for path, key, value in walk(ctx.deepspeed.tree):
        if key.refused:
            fix = f"write it as {key.instead!r}" if key.instead else ""
            yield Finding(f"deepspeed.{path}", f"{shown(value)}: {key.refused}", fix)


def _not_default(ctx: Context) -> Iterator[Finding]:
    for path, key, value in walk(ctx.deepspeed.tree):
        if key.only_default and value != key.default:
            what = f"{shown(value)}: {key.only_default}"
            yield Finding(f"deepspeed.{path}", what, f"delete it, or write {shown(key.default)}")


def _other_stage(ctx: Context) -> Iterator[Finding]:
    for path, key, value in walk(ctx.deepspeed.tree):
        # null, or a switch at its default, asks for what happens anyway
        is_default = value is None or (isinstance(value, bool) and value == bool(key.default))
        if not key.stages or ctx.stage in key.stages or is_default:
            continue
        stages = " and ".join(map(str, key.stages))
        what = f"{shown(value)} is read at ZeRO stage {stages} only; stage is {ctx.stage}"
        yield Finding(f"deepspeed.{path}", what)


def _partition(ctx: Context) -> Iterator[Finding]:
    path = f"{CHECKPOINTING}.partition_activations"
    if ctx.ds(path) and ctx.run("parallel.tp") == 1:
        yield Finding(f"deepspeed.{path}", "true with tp 1")


def _partition_sequence(ctx: Context) -> Iterator[Finding]:
    path = f"{CHECKPOINTING}.partition_activations"
    if ctx.ds(path) and ctx.run("parallel.sequence"):
        yield Finding(f"deepspeed.{path}", "true with parallel.sequence true")


def _partition_evenly(ctx: Context) -> Iterator[Finding]:
    path, tp = f"{CHECKPOINTING}.partition_activations", ctx.run("parallel.tp")
    batch = valid_batch(ctx)
    if not ctx.ds(path) or batch is None:
        return
    tokens, width = ctx.run("data.seq_len") // batch.cp, ctx.run("model.d_model")
    if batch.micro * tokens * width % tp:
        what = f"micro batch {batch.micro} x {tokens} tokens x d_model {width} is not a multiple of"
        yield Finding(f"deepspeed.{path}", f"{what} tp {tp}")


def _contiguous(ctx: Context) -> Iterator[Finding]:
    path = f"{CHECKPOINTING}.contiguous_memory_optimization"
    if ctx.ds(path) and not ctx.ds(f"{CHECKPOINTING}.partition_activations"):
        yield Finding(f"deepspeed.{path}", "true without partition_activations")
    if ctx.ds(path) and ctx.ds(f"{CHECKPOINTING}.number_checkpoints") is None:
        yield Finding(f"deepspeed.{path}", "true without number_checkpoints")


def _contiguous_in_pipeline(ctx: Context) -> Iterator[Finding]:
    path, pp = f"{CHECKPOINTING}.contiguous_memory_optimization", ctx.run("parallel.pp")
    if ctx.ds(path) and pp > 1:
        yield Finding(f"deepspeed.{path}", f"true with pp {pp}")


def _on_cpu(ctx: Context) -> Iterator[Finding]:
    for name in ("cpu_checkpointing", "synchronize_checkpoint_boundary"):
        if ctx.device == "cpu" and ctx.ds(f"{CHECKPOINTING}.{name}"):
            yield Finding(f"deepspeed.{CHECKPOINTING}.{name}", "true on a CPU")


def _segments(ctx: Context) -> Iterator[Finding]:
    path, layers = f"{CHECKPOINTING}.number_checkpoints", ctx.run("model.n_layer")
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


RULES = (
    Rule(
        "no-effect-here",
        "DeepSpeed knows the key, but FGPT does not use it, or DeepSpeed has removed it.",
        "delete it",
        _refused,
    ),
    Rule(
        "default-only",
        "DeepSpeed knows the key, but any value other than the default would have no effect"
        " here or would break a guarantee of FGPT's.",
        "delete it",
        _not_default,
    ),
    Rule(
        "other-zero-stage",
        "Only other ZeRO stages read the key; it has no effect at this one.",
        "delete it, or choose a stage that reads it",
        _other_stage,
    ),
    Rule(
        "partition-activations",
        "partition_activations divides activations among the tensor-parallel ranks; with tp 1"
        " there is only one.",
        "delete it",
        _partition,
    ),
    Rule(
        "partition-sequence",
        "With parallel.sequence the tensor-parallel ranks already hold different tokens;"
        " DeepSpeed would reassemble an activation from parts of different ones.",
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
        "DeepSpeed asserts that contiguous_memory_optimization has partition_activations and"
        " number_checkpoints beside it.",
        "delete it",
        _contiguous,
    ),
    Rule(
        "contiguous-in-pipeline",
        "DeepSpeed sizes the buffers for one pass through all blocks; a pipeline stage has"
        " several micro-batches in flight and can run out of them.",
        "delete it",
        _contiguous_in_pipeline,
    ),
    Rule(
        "checkpointing-on-cpu",
        "A CPU run keeps its activations in CPU memory anyway, and has no device to synchronize.",
        "delete it",
        _on_cpu,
    ),
    Rule(
        "number-checkpoints",
        "number_checkpoints is the number of equal groups of blocks that are recomputed"
        " together; with null each block is a group.",
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
        "Without verbose, DeepSpeed collects communication times and never prints them.",
        'write "verbose": true',
        _silent_log,
    ),
    Rule(
        "profile-after-end",
        "The run ends before the step that is to be profiled.",
        "choose a step within train.steps",
        _late_profile,
    ),
)
