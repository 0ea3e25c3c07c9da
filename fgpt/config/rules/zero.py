"""Rules about precision, ZeRO and offload."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.config.deepspeed.settings import GRAD_ACCUM_DTYPE, OPTIMIZER_OFFLOAD, PARAM_OFFLOAD
from fgpt.config.rules import Context, Finding, Rule

_ZERO = "zero_optimization"
_OFFLOADS = ((OPTIMIZER_OFFLOAD, 1), (PARAM_OFFLOAD, 3))
"""Section, and the lowest stage at which it has an effect."""


def _two_precisions(ctx: Context) -> Iterator[Finding]:
    if ctx.ds("fp16.enabled") and ctx.ds("bf16.enabled"):
        yield Finding("deepspeed.fp16.enabled", "true beside bf16.enabled true")


def _fp16_on_cpu(ctx: Context) -> Iterator[Finding]:
    if ctx.ds("fp16.enabled") and ctx.device == "cpu":
        yield Finding(
            "deepspeed.fp16.enabled",
            'true on a CPU, where DeepSpeed says "Type fp16 is not supported on your device."',
        )


def _half_zero_0(ctx: Context) -> Iterator[Finding]:
    if ctx.deepspeed.precision != "fp32" and ctx.stage == 0 and not ctx.is_plain:
        yield Finding(f"deepspeed.{_ZERO}.stage", f"stage 0 with {ctx.deepspeed.precision}")


def _accumulation_dtype(ctx: Context) -> Iterator[Finding]:
    dtype, precision = ctx.ds(GRAD_ACCUM_DTYPE), ctx.deepspeed.precision
    if dtype in (None, precision):
        return
    if dtype != "fp32" or ctx.stage == 0:
        what = f"{dtype} with {precision} and ZeRO-{ctx.stage}"
        yield Finding(f"deepspeed.{GRAD_ACCUM_DTYPE}", what)


def _immediate_update(ctx: Context) -> Iterator[Finding]:
    if ctx.ds("bf16.immediate_grad_update") and not ctx.deepspeed.has_separate_grad_sums:
        yield Finding("deepspeed.bf16.immediate_grad_update", "true")


def _bf16_master(ctx: Context) -> Iterator[Finding]:
    supported = ctx.stage > 0 and ctx.deepspeed.precision == "bf16" and ctx.deepspeed.uses_cpu_adam
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if ctx.ds(f"bf16.{name}") and not supported:
            yield Finding(f"deepspeed.bf16.{name}", "true without DeepSpeedCPUAdam in bf16")
    master = ctx.ds("bf16.bf16_master_weights_and_grads")
    if ctx.ds("bf16.bf16_optimizer_states") and not master:
        what = "true without bf16_master_weights_and_grads"
        yield Finding("deepspeed.bf16.bf16_optimizer_states", what)


_DYNAMIC_SCALE_KEYS = (
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
)


def _static_scale(ctx: Context) -> Iterator[Finding]:
    scale = ctx.ds("fp16.loss_scale")
    for name in _DYNAMIC_SCALE_KEYS:
        if scale > 0 and ctx.wrote(f"fp16.{name}"):
            yield Finding(f"deepspeed.fp16.{name}", f"written beside loss_scale {scale:g}")


def _offload_stage(ctx: Context) -> Iterator[Finding]:
    for section, lowest in _OFFLOADS:
        device = ctx.ds(f"{section}.device")
        if device != "none" and ctx.stage < lowest:
            what, fix = f"device {device} at stage {ctx.stage}", f"use stage {lowest} or higher"
            yield Finding(f"deepspeed.{section}", what, f"{fix}, or delete it")


def _nvme(ctx: Context) -> Iterator[Finding]:
    for section, _ in _OFFLOADS:
        if ctx.ds(f"{section}.device") == "nvme":
            yield Finding(f"deepspeed.{section}.device", "nvme")


def _partial_offload(ctx: Context) -> Iterator[Finding]:
    path = f"{OPTIMIZER_OFFLOAD}.ratio"
    ratio = ctx.ds(path)
    if ctx.deepspeed.optimizer is None:
        return
    if ratio < 1 and not (ctx.stage == 3 and ctx.deepspeed.uses_cpu_adam):
        yield Finding(f"deepspeed.{path}", f"{ratio:g} at stage {ctx.stage}")


def _even_bucket(ctx: Context) -> Iterator[Finding]:
    path = f"{_ZERO}.allgather_bucket_size"
    size = ctx.ds(path)
    if size % 2:
        yield Finding(f"deepspeed.{path}", f"{size:g} is odd")


def _scatter_scaling(ctx: Context) -> Iterator[Finding]:
    if ctx.stage < 2 or not ctx.ds(f"{_ZERO}.reduce_scatter"):
        return
    if ctx.ds("prescale_gradients"):
        yield Finding("deepspeed.prescale_gradients", f"true with ZeRO-{ctx.stage}")
    factor = ctx.ds("gradient_predivide_factor")
    if factor != 1:
        yield Finding("deepspeed.gradient_predivide_factor", f"{factor:g} with ZeRO-{ctx.stage}")


def _predivide_unread(ctx: Context) -> Iterator[Finding]:
    factor = ctx.ds("gradient_predivide_factor")
    if ctx.ds("prescale_gradients") and factor != 1:
        what = f"{factor:g} beside prescale_gradients true"
        yield Finding("deepspeed.gradient_predivide_factor", what)


RULES = (
    Rule(
        "two-precisions",
        "fp16 and bf16 exclude each other.",
        "enable one of fp16 and bf16",
        _two_precisions,
    ),
    Rule(
        "fp16-on-cpu",
        "DeepSpeed does not train in fp16 on a CPU.",
        "use bf16 or fp32 there, fp16 on a GPU",
        _fp16_on_cpu,
    ),
    Rule(
        "half-precision-zero-0",
        "With ZeRO-0 in fp16 or bf16, DeepSpeed takes an optimizer step on zero gradients"
        " during initialization: weights decay once, and Adam's step count stays one ahead.",
        "use stage 1, which computes the same correctly, also on one process",
        _half_zero_0,
    ),
    Rule(
        "grad-accum-dtype",
        "Gradients can be added up in the training precision, or in fp32 from ZeRO-1 on; with"
        " other combinations DeepSpeed raises, or silently narrows the sums.",
        "use fp32 with ZeRO 1 to 3, or delete it",
        _accumulation_dtype,
    ),
    Rule(
        "immediate-grad-update",
        "Only DeepSpeed's BF16_Optimizer reads the key: bf16 with ZeRO-1, fp32 accumulation"
        " and no offload.",
        "delete it",
        _immediate_update,
    ),
    Rule(
        "bf16-master-weights",
        "Master weights or moments in bf16 need bf16, ZeRO 1 to 3 and DeepSpeedCPUAdam"
        " (offload_optimizer on cpu, AdamW without torch_adam).",
        "delete it, or offload the optimizer",
        _bf16_master,
    ),
    Rule(
        "static-loss-scale",
        "A fixed loss_scale never changes, so DeepSpeed does not read the keys of the dynamic"
        " scale.",
        "delete the key, or write loss_scale 0 for a dynamic scale",
        _static_scale,
    ),
    Rule(
        "offload-stage",
        "Only states that ZeRO shards can be offloaded: the optimizer's from stage 1 on,"
        " parameters at stage 3. At lower stages DeepSpeed ignores the section.",
        "raise the stage, or delete the section",
        _offload_stage,
    ),
    Rule(
        "no-nvme-yet",
        "Offload to NVMe needs DeepSpeed's async_io operator (libaio), which FGPT does not"
        " test yet.",
        'use "device": "cpu"',
        _nvme,
    ),
    Rule(
        "partial-offload",
        "Only at ZeRO-3 with DeepSpeedCPUAdam can part of the optimizer stay on the device.",
        "write ratio 1.0, or use stage 3 without torch_adam",
        _partial_offload,
    ),
    Rule(
        "even-allgather-bucket",
        "DeepSpeed asserts that allgather_bucket_size is even, after the model is built.",
        "use an even number",
        _even_bucket,
    ),
    Rule(
        "reduce-scatter-scaling",
        "With reduce_scatter at ZeRO 2 and 3, DeepSpeed asserts that gradients are not scaled"
        " before they are reduced.",
        'delete it, or write "reduce_scatter": false',
        _scatter_scaling,
    ),
    Rule(
        "predivide-unread",
        "With prescale_gradients, DeepSpeed divides by dp and does not read"
        " gradient_predivide_factor.",
        "keep one of the two",
        _predivide_unread,
    ),
)
