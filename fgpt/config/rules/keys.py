"""Rules about keys without effect, activation checkpointing, monitors and profilers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fgpt.config.deepspeed.settings import CHECKPOINTING, walk
from fgpt.config.rules import Context, Finding, rule
from fgpt.config.rules.layout import valid_batch
from fgpt.config.speed import compiles_blocks
from fgpt.errors import Edit, Grade
from fgpt.utils.keys import AUTO, shown


@rule("not-supported", "delete it")
def _refused(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed knows the feature and FGPT does not train with it, or DeepSpeed has removed it."""
    for path, key, value in walk(ctx.deepspeed.tree):
        if not key.refused:
            continue
        what = f"{shown(value)}: {key.refused}"
        if _is_switched_off(value) or (key.default is not None and value == key.default):
            yield Finding(
                f"deepspeed.{path}", what, "dropped: it asks for nothing", grade="warning"
            )
        elif key.instead:
            edits, fix = [Edit(f"deepspeed.{path}")], f"delete it: {key.instead} is written too"
            if not ctx.wrote(key.instead):
                edits.append(Edit(f"deepspeed.{key.instead}", value))
                fix = f"write it as {key.instead!r}"
            yield Finding(f"deepspeed.{path}", what, fix, tuple(edits))
        else:
            yield Finding(f"deepspeed.{path}", what)


def _is_switched_off(value: object) -> bool:
    if isinstance(value, dict):
        return value.get("enabled", bool(value)) in (False, None, AUTO)  # Trainer's "auto": off
    return value in (None, False, -1)  # -1: mics_shard_size


@rule("unread", "dropped", "warning")
def _unread(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed knows the key, but here it has no effect, whatever its value."""
    for path, key, value in walk(ctx.deepspeed.tree):
        if key.unread:
            what, is_off = f"{shown(value)}: {key.unread}", _is_switched_off(value)
            yield Finding(f"deepspeed.{path}", what, grade="note" if is_off else None)


@rule("default-only", "delete it")
def _not_default(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed knows the key, but any value other than the default would have no effect here or
    would break a guarantee of FGPT's.
    """
    for path, key, value in walk(ctx.deepspeed.tree):
        if key.only_default and value != key.default:
            what = f"{shown(value)}: {key.only_default}"
            fix = f"delete it, or write {shown(key.default)}"
            yield Finding(f"deepspeed.{path}", what, fix)


@rule("other-zero-stage", "dropped", "warning")
def _other_stage(ctx: Context) -> Iterator[Finding]:
    """Only other ZeRO stages read the key; it has no effect at this one."""
    for path, key, value in walk(ctx.deepspeed.tree):
        # null, or a switch at its default, asks for what happens anyway
        is_default = value is None or (isinstance(value, bool) and value == bool(key.default))
        if not key.stages or ctx.stage in key.stages or is_default:
            continue
        stages = " and ".join(map(str, key.stages))
        what = f"{shown(value)} is read at ZeRO stage {stages} only; stage is {ctx.stage}"
        yield Finding(f"deepspeed.{path}", what)


@rule("other-offload-device", "dropped", "warning")
def _other_device(ctx: Context) -> Iterator[Finding]:
    """Only offload to another device reads the key."""
    if ctx.wrote("aio") and not ctx.deepspeed.nvme_paths:
        yield Finding("deepspeed.aio", "is read with device nvme only")
    for path, key, value in walk(ctx.deepspeed.tree):
        device = ctx.ds(f"{path.rpartition('.')[0]}.device") if key.device else None
        if device != (key.device or None) and value is not None:
            what = f"{shown(value)} is read with device {key.device} only; device is {device}"
            grade: Grade | None = "note" if value == key.default else None
            yield Finding(f"deepspeed.{path}", what, grade=grade)


@rule("partition-activations", "dropped", "warning")
def _partition(ctx: Context) -> Iterator[Finding]:
    """partition_activations divides activations among the tensor-parallel ranks; with tp 1 there is
    only one.
    """
    path = f"{CHECKPOINTING}.partition_activations"
    if ctx.ds(path) and ctx.run("parallel.tp") == 1:
        yield Finding(f"deepspeed.{path}", "true with tp 1")


@rule("partition-sequence", "dropped", "warning")
def _partition_sequence(ctx: Context) -> Iterator[Finding]:
    """With parallel.sequence the tensor-parallel ranks already hold different tokens; DeepSpeed
    would reassemble an activation from parts of different ones.
    """
    path = f"{CHECKPOINTING}.partition_activations"
    if ctx.ds(path) and ctx.run("parallel.sequence"):
        yield Finding(f"deepspeed.{path}", "true with parallel.sequence true")


@rule("partition-evenly", "delete it, or change the micro batch")
def _partition_evenly(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed asserts that the input of a block divides evenly over the tensor-parallel ranks."""
    path, tp = f"{CHECKPOINTING}.partition_activations", ctx.run("parallel.tp")
    batch = valid_batch(ctx)
    if not ctx.ds(path) or batch is None:
        return
    tokens, width = ctx.run("data.seq_len") // batch.cp, ctx.run("model.d_model")
    if batch.micro * tokens * width % tp:
        what = f"micro batch {batch.micro} x {tokens} tokens x d_model {width} is not a multiple of"
        yield Finding(f"deepspeed.{path}", f"{what} tp {tp}")


@rule("contiguous-checkpoints", "delete it")
def _contiguous(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed asserts that contiguous_memory_optimization has partition_activations and
    number_checkpoints beside it.
    """
    path = f"{CHECKPOINTING}.contiguous_memory_optimization"
    if not ctx.ds(path):
        return
    if ctx.run("parallel.tp") == 1:
        # partition_activations would have no effect either
        yield Finding(f"deepspeed.{path}", "true with tp 1", "dropped", grade="warning")
        return
    if not ctx.ds(f"{CHECKPOINTING}.partition_activations"):
        yield Finding(f"deepspeed.{path}", "true without partition_activations")
    if ctx.ds(f"{CHECKPOINTING}.number_checkpoints") is None:
        yield Finding(f"deepspeed.{path}", "true without number_checkpoints")


@rule("contiguous-in-pipeline", "delete it")
def _contiguous_in_pipeline(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed sizes the buffers for one pass through all blocks; a pipeline stage has several
    micro-batches in flight and can run out of them.
    """
    path, pp = f"{CHECKPOINTING}.contiguous_memory_optimization", ctx.run("parallel.pp")
    if ctx.ds(path) and pp > 1:
        yield Finding(f"deepspeed.{path}", f"true with pp {pp}")


@rule("checkpointing-on-cpu", "dropped", "warning")
def _on_cpu(ctx: Context) -> Iterator[Finding]:
    """A CPU run keeps its activations in CPU memory anyway, and has no device to synchronize."""
    for name in ("cpu_checkpointing", "synchronize_checkpoint_boundary"):
        if ctx.device == "cpu" and ctx.ds(f"{CHECKPOINTING}.{name}"):
            yield Finding(f"deepspeed.{CHECKPOINTING}.{name}", "true on a CPU")


@rule("number-checkpoints", "the nearest divisor of n_layer is used", "warning")
def _segments(ctx: Context) -> Iterator[Finding]:
    """number_checkpoints is the number of equal groups of blocks that are recomputed together; with
    null each block is a group.
    """
    path, layers = f"{CHECKPOINTING}.number_checkpoints", ctx.run("model.n_layer")
    segments = ctx.ds(path)
    if segments is not None and layers % segments:
        divisors = [n for n in range(1, layers + 1) if layers % n == 0]
        near = min(divisors, key=lambda n: abs(n - segments))
        what = f"{segments} does not divide n_layer {layers}"
        edits = (Edit(f"deepspeed.{path}", near),)
        yield Finding(f"deepspeed.{path}", what, f"{near} is used", edits)


@rule("monitor-package", "the monitor is turned off", "warning")
def _package(ctx: Context) -> Iterator[Finding]:
    """The monitor needs an optional package."""
    for name in ("tensorboard", "wandb"):
        if ctx.ds(f"{name}.enabled") and name not in ctx.packages:
            what = f"true, but the package {name} is not installed"
            fix = f"turned off; to turn it on: pip install 'fgpt[{name}]'"
            where = f"deepspeed.{name}.enabled"
            yield Finding(where, what, fix, (Edit(where, False),))


@rule("output-path", "name another path, or leave it out")
def _output_path(ctx: Context) -> Iterator[Finding]:
    """A monitor writes to the directory output_path/job_name, the flops profiler to a file."""
    for name in ctx.deepspeed.monitors:
        output = str(ctx.ds(f"{name}.output_path") or "")
        for folder in (Path(output), *Path(output).parents):
            if folder.is_file():
                where = f"deepspeed.{name}.output_path"
                yield Finding(where, f"{output!r}: {str(folder)!r} is a file")
    output = str(ctx.ds("flops_profiler.output_file") or "")
    if ctx.ds("flops_profiler.enabled") and output and Path(output).is_dir():
        yield Finding("deepspeed.flops_profiler.output_file", f"{output!r} is a directory")


@rule("comms-logger-silent", 'turned off; "verbose": true prints each message', "warning")
def _silent_log(ctx: Context) -> Iterator[Finding]:
    """Without verbose, DeepSpeed collects communication times and never prints them."""
    if ctx.ds("comms_logger.enabled") and not ctx.ds("comms_logger.verbose"):
        where = "deepspeed.comms_logger.enabled"
        yield Finding(where, "true with verbose false", edits=(Edit(where, False),))


@rule("comms-logger-partial", "the data-parallel lines are complete", "warning")
def _partial_log(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed logs the communication that it starts itself, not that of FGPT's parallel layers,
    and computes each bandwidth as if all processes took part.
    """
    if ctx.ds("comms_logger.enabled") and ctx.ds("comms_logger.verbose"):
        sizes = {axis: ctx.run(f"parallel.{axis}") for axis in ("tp", "pp", "cp")}
        if grid := ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1):
            yield Finding("deepspeed.comms_logger.enabled", f"true with {grid}", edits=())


@rule("profile-eager", "speed.compile off profiles what is trained", "warning")
def _eager_profile(ctx: Context) -> Iterator[Finding]:
    """The profiler times modules one by one, so the profiled step runs the blocks uncompiled."""
    if ctx.ds("flops_profiler.enabled") and compiles_blocks(ctx.run_config, ctx.stage, ctx.device):
        where = "deepspeed.flops_profiler.enabled"
        yield Finding(where, "true with compiled blocks", edits=())


@rule("profile-after-end", "turned off; choose a step within train.steps", "warning")
def _late_profile(ctx: Context) -> Iterator[Finding]:
    """The run ends before the step that is to be profiled."""
    step, steps = ctx.ds("flops_profiler.profile_step"), ctx.run("train.steps")
    if ctx.ds("flops_profiler.enabled") and step >= steps:
        where, switch = "deepspeed.flops_profiler.profile_step", "deepspeed.flops_profiler.enabled"
        yield Finding(where, f"{step} of {steps} steps", edits=(Edit(switch, False),))
