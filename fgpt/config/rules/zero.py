"""Rules about precision, ZeRO and offload."""

from __future__ import annotations

import os
from collections.abc import Iterator

from fgpt.config.deepspeed.settings import GRAD_ACCUM_DTYPE, OPTIMIZER_OFFLOAD, PARAM_OFFLOAD
from fgpt.config.rules import Context, Finding, rule
from fgpt.config.rules.layout import valid_batch
from fgpt.config.schema import Shapes
from fgpt.errors import Edit

_ZERO = "zero_optimization"
_SECTOR_BYTES, _PAGE_BYTES = 512, 4096
_OFFLOADS = ((OPTIMIZER_OFFLOAD, 1), (PARAM_OFFLOAD, 3))
"""Section, and the lowest stage at which it has an effect."""


@rule("two-precisions", "enable one of fp16 and bf16")
def _two_precisions(ctx: Context) -> Iterator[Finding]:
    """fp16 and bf16 exclude each other."""
    if ctx.ds("fp16.enabled") and ctx.ds("bf16.enabled"):
        where = "deepspeed.fp16.enabled"
        yield Finding(where, "true beside bf16.enabled true", edits=(Edit(where, False),))


@rule("fp16-on-cpu", "use bf16 or fp32 there, fp16 on a GPU")
def _fp16_on_cpu(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed does not train in fp16 on a CPU."""
    if ctx.ds("fp16.enabled") and ctx.device == "cpu":
        yield Finding(
            "deepspeed.fp16.enabled",
            'true on a CPU, where DeepSpeed says "Type fp16 is not supported on your device."',
            edits=(Edit("deepspeed.fp16"), Edit("deepspeed.bf16", {"enabled": True})),
        )


@rule("half-precision-zero-0", "stage 1 runs, which computes the same correctly", "warning")
def _half_zero_0(ctx: Context) -> Iterator[Finding]:
    """With ZeRO-0 in fp16 or bf16, DeepSpeed takes an optimizer step on zero gradients during
    initialization: weights decay once, and Adam's step count stays one ahead.
    """
    if ctx.deepspeed.precision != "fp32" and ctx.stage == 0 and not ctx.is_plain:
        where, edits = f"deepspeed.{_ZERO}.stage", [Edit(f"deepspeed.{_ZERO}.stage", 1)]
        if ctx.ds(GRAD_ACCUM_DTYPE) is None and ctx.deepspeed.precision == "bf16":
            edits.append(Edit(f"deepspeed.{GRAD_ACCUM_DTYPE}", "fp32"))  # as stage 0 adds them up
        yield Finding(where, f"stage 0 with {ctx.deepspeed.precision}", edits=tuple(edits))


@rule("grad-accum-dtype", "use fp32 with ZeRO 1 to 3, or delete it")
def _accumulation_dtype(ctx: Context) -> Iterator[Finding]:
    """Gradients can be added up in the training precision, or in fp32 from ZeRO-1 on; with other
    combinations DeepSpeed raises, or silently narrows the sums.
    """
    dtype, precision = ctx.ds(GRAD_ACCUM_DTYPE), ctx.deepspeed.precision
    if dtype in (None, precision):
        return
    if dtype != "fp32" or ctx.stage == 0:
        what = f"{dtype} with {precision} and ZeRO-{ctx.stage}"
        yield Finding(f"deepspeed.{GRAD_ACCUM_DTYPE}", what)


@rule("immediate-grad-update", "dropped", "warning")
def _immediate_update(ctx: Context) -> Iterator[Finding]:
    """Only DeepSpeed's BF16_Optimizer reads the key: bf16 with ZeRO-1, fp32 accumulation and no
    offload.
    """
    if ctx.ds("bf16.immediate_grad_update") and not ctx.deepspeed.has_separate_grad_sums:
        yield Finding("deepspeed.bf16.immediate_grad_update", "true")


@rule("bf16-master-weights", "delete it, or write what it needs")
def _bf16_master(ctx: Context) -> Iterator[Finding]:
    """Master weights in bf16 need bf16 and ZeRO: with the optimizer offloaded to cpu,
    DeepSpeedCPUAdam; without offload, stage 2 or 3, torch's Adam and bf16_optimizer_states.
    """
    master, states = "bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"
    wrong = ""
    if not ctx.ds(master) and not ctx.ds(states):
        return
    if ctx.deepspeed.precision != "bf16" or ctx.stage == 0:
        wrong = f"true with {ctx.deepspeed.precision} and ZeRO-{ctx.stage}"
    elif not ctx.ds(master):
        wrong = "true without bf16_master_weights_and_grads"
    elif ctx.deepspeed.offloads_optimizer:
        wrong = "" if ctx.deepspeed.uses_cpu_adam else "true without DeepSpeedCPUAdam"
    elif not ctx.ds(states):
        wrong = "true without bf16_optimizer_states or offload_optimizer"
    elif ctx.stage < 2 or ctx.deepspeed.implementation != "torch" or ctx.wrote(GRAD_ACCUM_DTYPE):
        wrong = f"true at stage {ctx.stage} without offload, torch's Adam or with grad_accum_dtype"
    if wrong:
        where = f"deepspeed.{master if ctx.ds(master) else states}"
        yield Finding(
            where, wrong, edits=(Edit(f"deepspeed.{master}"), Edit(f"deepspeed.{states}"))
        )


AUTOCAST = "torch_autocast"


@rule("autocast", "delete it, or change what it names")
def _autocast(ctx: Context) -> Iterator[Finding]:
    """torch_autocast computes in bfloat16 with fp32 weights. It is FGPT's only beside fp32, on
    DeepSpeed's engine and without tensor, pipeline and context parallelism; float16 would need a
    loss scale there, which FGPT has not tested.
    """
    if not ctx.ds(f"{AUTOCAST}.enabled"):
        return
    where = f"deepspeed.{AUTOCAST}"
    if ctx.deepspeed.precision != "fp32":
        yield Finding(where, f"enabled beside {ctx.deepspeed.precision}.enabled true")
    if ctx.ds(f"{AUTOCAST}.dtype") == "float16":
        edits = (Edit(f"{where}.dtype", "bfloat16"),)
        yield Finding(f"{where}.dtype", "float16", 'write "bfloat16"', edits)
    if ctx.is_plain:
        yield Finding(where, "enabled with train.engine plain")
    for axis in ("tp", "pp", "cp"):
        if ctx.run(f"parallel.{axis}") > 1:
            yield Finding(where, f"enabled with {axis} {ctx.run(f'parallel.{axis}')}")


@rule("autocast-dtype", "bfloat16 is written", "warning")
def _autocast_dtype(ctx: Context) -> Iterator[Finding]:
    """Without dtype, torch takes float16 on a GPU and bfloat16 on a CPU."""
    if ctx.ds(f"{AUTOCAST}.enabled") and ctx.ds(f"{AUTOCAST}.dtype") is None:
        where = f"deepspeed.{AUTOCAST}.dtype"
        yield Finding(where, "not written", edits=(Edit(where, "bfloat16"),))


@rule("hpz-size", "choose a divisor of the number of processes, or delete it")
def _hpz(ctx: Context) -> Iterator[Finding]:
    """Each group of zero_hpz_partition_size processes holds the weights once more, so that the
    backward pass gathers them within a node. DeepSpeed counts all processes as data parallel there.
    """
    path = f"{_ZERO}.zero_hpz_partition_size"
    size = ctx.ds(path)
    if size == 1 or ctx.stage != 3:
        return
    if ctx.world % size:
        yield Finding(f"deepspeed.{path}", f"{size} does not divide {ctx.world} processes")
    for axis in ("tp", "pp", "cp"):
        if ctx.run(f"parallel.{axis}") > 1:
            what = f"{size} with {axis} {ctx.run(f'parallel.{axis}')}"
            yield Finding(f"deepspeed.{path}", what)


_DYNAMIC_SCALE_KEYS = (
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
)


@rule("static-loss-scale", "dropped; loss_scale 0 is a dynamic scale", "warning")
def _static_scale(ctx: Context) -> Iterator[Finding]:
    """A fixed loss_scale never changes; DeepSpeed does not read the keys of the dynamic scale."""
    scale = ctx.ds("fp16.loss_scale")
    for name in _DYNAMIC_SCALE_KEYS:
        if scale > 0 and ctx.wrote(f"fp16.{name}"):
            yield Finding(f"deepspeed.fp16.{name}", f"written beside loss_scale {scale:g}")


@rule("offload-stage", "dropped; a higher stage would offload", "warning")
def _offload_stage(ctx: Context) -> Iterator[Finding]:
    """Only states that ZeRO shards can be offloaded: the optimizer's from stage 1 on, parameters at
    stage 3. At lower stages DeepSpeed ignores the section.
    """
    for section, lowest in _OFFLOADS:
        device = ctx.ds(f"{section}.device")
        if device != "none" and ctx.stage < lowest:
            what = f"device {device} at stage {ctx.stage}"
            fix = f"dropped; stage {lowest} or higher would offload"
            yield Finding(f"deepspeed.{section}", what, fix)


@rule("nvme-stage", "read as cpu", "warning")
def _nvme_stage(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed swaps optimizer states to NVMe at stage 3; at stages 1 and 2 it keeps them in host
    memory.
    """
    where = f"{OPTIMIZER_OFFLOAD}.device"
    if ctx.ds(where) == "nvme" and ctx.stage in (1, 2):
        edits = (Edit(f"deepspeed.{where}", "cpu"),)
        yield Finding(f"deepspeed.{where}", f"nvme at stage {ctx.stage}", edits=edits)


@rule("nvme-optimizer", 'use "device": "cpu", or change what it names')
def _nvme_optimizer(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed reads and writes optimizer states on NVMe as fp32 tensors of whole sub-groups."""
    optimizer, where = ctx.deepspeed.optimizer, f"deepspeed.{OPTIMIZER_OFFLOAD}.device"
    if ctx.ds(f"{OPTIMIZER_OFFLOAD}.device") != "nvme" or not optimizer or ctx.stage != 3:
        return
    wrong = []
    if not optimizer.is_adam:
        wrong.append(f"with {optimizer.name}")
    if ctx.ds("bf16.bf16_master_weights_and_grads"):
        wrong.append("with bf16_master_weights_and_grads")
    if ctx.ds(f"{OPTIMIZER_OFFLOAD}.ratio") < 1:
        wrong.append(f"with ratio {ctx.ds(f'{OPTIMIZER_OFFLOAD}.ratio'):g}")
    if ctx.run("train.ema") is not None:
        wrong.append("with train.ema, which averages master weights in memory")
    if wrong:
        yield Finding(where, f"nvme {', '.join(wrong)}", edits=(Edit(where, "cpu"),))


@rule("nvme-buffers", "raised", "warning")
def _nvme_buffers(ctx: Context) -> Iterator[Finding]:
    """A sub-group needs a buffer for its weights, gradients and each state; with pipeline_read or
    pipeline_write, three sub-groups are in memory.
    """
    optimizer, path = ctx.deepspeed.optimizer, f"{OPTIMIZER_OFFLOAD}.buffer_count"
    if ctx.ds(f"{OPTIMIZER_OFFLOAD}.device") != "nvme" or not optimizer or ctx.stage != 3:
        return
    needed = 2 + len(optimizer.state_names(ctx.deepspeed.optimizer_params))
    pipeline = [f"pipeline_{way}" for way in ("read", "write")]
    if any(ctx.ds(f"{OPTIMIZER_OFFLOAD}.{name}") for name in pipeline):
        needed *= 3
    if ctx.ds(path) < needed:
        edits = (Edit(f"deepspeed.{path}", needed),)
        yield Finding(f"deepspeed.{path}", f"{ctx.ds(path)} of {needed}", edits=edits)


@rule("nvme-path", 'write "nvme_path": a writable directory on a local disk, or use cpu')
def _nvme_path(ctx: Context) -> Iterator[Finding]:
    """What is on NVMe is files in this directory, on each node."""
    for section, _ in _OFFLOADS:
        where, path = f"deepspeed.{section}.nvme_path", ctx.ds(f"{section}.nvme_path")
        if ctx.ds(f"{section}.device") != "nvme" or ctx.stage != 3:
            continue
        edits = (Edit(f"deepspeed.{section}.device", "cpu"),)
        if path is None:
            yield Finding(where, "not written with device nvme", edits=edits)
        elif not (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)):
            fix = f'mkdir -p {path} on a local disk, or write "device": "cpu"'
            yield Finding(where, f"{path!r} is no writable directory", fix, edits)


@rule("nvme-buffer", "raise it, or delete it")
def _nvme_buffer(ctx: Context) -> Iterator[Finding]:
    """A buffer of offload_param must hold the largest weight's part on a rank."""
    path, model = f"{PARAM_OFFLOAD}.buffer_size", ctx.run("model")
    batch = valid_batch(ctx)
    if ctx.ds(f"{PARAM_OFFLOAD}.device") != "nvme" or ctx.stage != 3 or batch is None:
        return
    rows = max(
        model.vocab_size, model.max_seq_len, Shapes.of(model).d_qkv, 2 * Shapes.of(model).d_ff
    )
    needed = -(-rows * model.d_model // batch.dp)
    if ctx.ds(path) < needed:
        where, what = f"deepspeed.{path}", f"{ctx.ds(path):g} of {needed} elements"
        yield Finding(where, what, edits=(Edit(where, needed),))


@rule("aio-block", "rounded up", "warning")
def _aio_block(ctx: Context) -> Iterator[Finding]:
    """Direct I/O needs blocks of whole sectors; DeepSpeed's operator aborts on others."""
    size = ctx.ds("aio.block_size")
    if ctx.deepspeed.nvme_paths and size % _SECTOR_BYTES:
        edits = (Edit("deepspeed.aio.block_size", -(-int(size) // _PAGE_BYTES) * _PAGE_BYTES),)
        yield Finding("deepspeed.aio.block_size", f"{size:g} bytes", edits=edits)


@rule("partial-offload", "dropped: all of it is offloaded", "warning")
def _partial_offload(ctx: Context) -> Iterator[Finding]:
    """Only at ZeRO-3 with DeepSpeedCPUAdam can part of the optimizer stay on the device."""
    path = f"{OPTIMIZER_OFFLOAD}.ratio"
    ratio = ctx.ds(path)
    if ctx.deepspeed.optimizer is None:
        return
    if ratio < 1 and not (ctx.stage == 3 and ctx.deepspeed.uses_cpu_adam):
        yield Finding(f"deepspeed.{path}", f"{ratio:g} at stage {ctx.stage}")


@rule("even-allgather-bucket", "use an even number")
def _even_bucket(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed asserts that allgather_bucket_size is even, after the model is built."""
    path = f"{_ZERO}.allgather_bucket_size"
    size = ctx.ds(path)
    if size % 2:
        where = f"deepspeed.{path}"
        yield Finding(where, f"{size:g} is odd", edits=(Edit(where, int(size) + 1),))


@rule("reduce-scatter-scaling", 'write "reduce_scatter": false, or delete it')
def _scatter_scaling(ctx: Context) -> Iterator[Finding]:
    """With reduce_scatter at ZeRO 2 and 3, DeepSpeed asserts that gradients are not scaled before
    they are reduced.
    """
    if ctx.stage < 2 or not ctx.ds(f"{_ZERO}.reduce_scatter"):
        return
    edits = (Edit(f"deepspeed.{_ZERO}.reduce_scatter", False),)
    if ctx.ds("prescale_gradients"):
        what = f"true with ZeRO-{ctx.stage}"
        yield Finding("deepspeed.prescale_gradients", what, edits=edits)
    factor = ctx.ds("gradient_predivide_factor")
    if factor != 1:
        what = f"{factor:g} with ZeRO-{ctx.stage}"
        yield Finding("deepspeed.gradient_predivide_factor", what, edits=edits)


@rule("predivide-unread", "dropped", "warning")
def _predivide_unread(ctx: Context) -> Iterator[Finding]:
    """With prescale_gradients DeepSpeed does not read gradient_predivide_factor."""
    factor = ctx.ds("gradient_predivide_factor")
    if ctx.ds("prescale_gradients") and factor != 1:
        what = f"{factor:g} beside prescale_gradients true"
        yield Finding("deepspeed.gradient_predivide_factor", what)
