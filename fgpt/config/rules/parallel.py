"""Rules about tensor, sequence, context and pipeline parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fgpt.config.pipeline_partition import (
    BY_LAYERS,
    BY_PARAMETERS,
    BY_TYPE,
    blocks_by_hand,
    has_type,
    layer_classes,
)
from fgpt.config.rules.context import Context, Finding, Rule
from fgpt.utils.keys import did_you_mean


def _heads_over_tp(ctx: Context) -> Iterator[Finding]:
    ranks, sizes = _ranks(ctx, "tp", "cp")
    for name in ("n_head", "n_kv_head"):
        heads = ctx.run(f"model.{name}")
        if heads % ranks:
            yield Finding(f"run.model.{name}", f"{heads} is not a multiple of {sizes}")


def _ff_over_tp(ctx: Context) -> Iterator[Finding]:
    tp, width = ctx.run("parallel.tp"), ctx.run("model.d_ff")
    if width % tp:
        yield Finding("run.model.d_ff", f"{width} is not a multiple of tp {tp}")


def _sequence_over_ranks(ctx: Context) -> Iterator[Finding]:
    axes = ("cp", "tp") if ctx.run("parallel.sequence") else ("cp",)
    length, (ranks, sizes) = ctx.run("data.seq_len"), _ranks(ctx, *axes)
    if length % ranks:
        yield Finding("run.data.seq_len", f"{length} is not a multiple of {sizes}")


def _ranks(ctx: Context, *axes: str) -> tuple[int, str]:
    """The product of the axes' sizes, and how to say it: `tp 2 x cp 2 = 4`."""
    sizes = {axis: ctx.run(f"parallel.{axis}") for axis in axes}
    product = math.prod(sizes.values())
    named = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    return product, " x ".join(named) + (f" = {product}" if len(named) > 1 else "")


def _sequence_needs_tp(ctx: Context) -> Iterator[Finding]:
    if ctx.run("parallel.sequence") and ctx.run("parallel.tp") == 1:
        yield Finding("run.parallel.sequence", "true with tp 1")


def _layers_over_pp(ctx: Context) -> Iterator[Finding]:
    pp, layers = ctx.run("parallel.pp"), ctx.run("model.n_layer")
    if layers < pp:
        yield Finding("run.parallel.pp", f"{pp} stages for n_layer {layers}")


def _partition(ctx: Context) -> Iterator[Finding]:
    text, pp = ctx.run("parallel.partition"), ctx.run("parallel.pp")
    if text == BY_PARAMETERS:
        return
    blocks = blocks_by_hand(text)
    if pp == 1:
        what, fix = f"{text!r} with pp 1, where nothing is divided", "delete it"
    elif blocks is not None:
        what, fix = _blocks_issue(blocks, pp, ctx.run("model.n_layer")), ""
    elif text.startswith(BY_TYPE):
        what, fix = _type_issue(text, layer_classes(ctx.run("model"))), ""
    elif text == BY_LAYERS:
        return
    else:
        known = did_you_mean(text, (BY_PARAMETERS, BY_LAYERS, BY_TYPE + "Block"))
        what, fix = f"{text!r} is none of the ways to divide layers{known}", ""
    if what:
        yield Finding("run.parallel.partition", what, fix)


def _blocks_issue(blocks: list[int], pp: int, layers: int) -> str:
    shown = ",".join(map(str, blocks))
    if len(blocks) != pp:
        return f"{shown} is for {len(blocks)} stage(s), pp is {pp}"
    if 0 in blocks:
        return f"{shown} leaves stage {blocks.index(0)} without a block"
    if sum(blocks) != layers:
        return f"{shown} are {sum(blocks)} blocks, n_layer is {layers}"
    return ""


def _type_issue(text: str, classes: list[str]) -> str:
    if text != BY_TYPE and any(has_type(name, text) for name in classes):
        return ""
    return f"{text!r} matches no layer; there are {', '.join(dict.fromkeys(classes))}"


def _pipeline_zero(ctx: Context) -> Iterator[Finding]:
    pp = ctx.run("parallel.pp")
    if pp > 1 and ctx.stage >= 2:
        yield Finding("deepspeed.zero_optimization.stage", f"stage {ctx.stage} with pp {pp}")


def _pipeline_bf16(ctx: Context) -> Iterator[Finding]:
    pp, dtype = ctx.run("parallel.pp"), ctx.ds("data_types.grad_accum_dtype")
    if pp > 1 and ctx.precision == "bf16" and ctx.stage == 1 and dtype != "fp32":
        yield Finding(
            "deepspeed.data_types.grad_accum_dtype",
            f"{dtype or 'not said'} with pp {pp} and ZeRO-1",
        )


def _pipeline_tied(ctx: Context) -> Iterator[Finding]:
    half, offload = ctx.precision, ctx.offloads_optimizer
    if ctx.run("parallel.pp") == 1 or not ctx.run("model.tied_head") or half == "fp32":
        return
    if ctx.ds("data_types.grad_accum_dtype") == "fp32" and (half == "fp16" or offload):
        what = f"fp32 with {half}{' and offload_optimizer' if offload else ''} and a tied head"
        yield Finding("deepspeed.data_types.grad_accum_dtype", what)


def _pipeline_overlap(ctx: Context) -> Iterator[Finding]:
    path, pp = "zero_optimization.overlap_comm", ctx.run("parallel.pp")
    if pp > 1 and ctx.ds(path):
        yield Finding(f"deepspeed.{path}", f"true with pp {pp}")


def _pipeline_timers(ctx: Context) -> Iterator[Finding]:
    pp = ctx.run("parallel.pp")
    for path in ("wall_clock_breakdown", "flops_profiler.enabled"):
        if pp > 1 and ctx.ds(path):
            yield Finding(f"deepspeed.{path}", f"true with pp {pp}")


RULES = (
    Rule(
        "heads-over-tp",
        "Tensor parallelism gives each rank whole heads; context parallelism trades tokens for"
        " heads, and each rank attends with its share of them.",
        "choose tp x cp that divides n_head and n_kv_head",
        _heads_over_tp,
    ),
    Rule(
        "ff-over-tp",
        "Tensor parallelism gives each rank equally many hidden elements of the MLP.",
        "choose tp that divides d_ff",
        _ff_over_tp,
    ),
    Rule(
        "sequence-over-ranks",
        "Each context-parallel rank holds equally many tokens of a sample, and with"
        " parallel.sequence each tensor-parallel rank equally many of those.",
        "change data.seq_len, or --cp / --tp",
        _sequence_over_ranks,
    ),
    Rule(
        "sequence-needs-tp",
        "Sequence parallelism shares out what tensor-parallel ranks would repeat; with tp 1 there"
        " are none.",
        "raise tp, or leave parallel.sequence out",
        _sequence_needs_tp,
    ),
    Rule(
        "layers-over-pp",
        "A pipeline stage needs a block.",
        "use at most n_layer stages",
        _layers_over_pp,
    ),
    Rule(
        "partition-text",
        "parallel.partition divides the layers among the pipeline's stages, at least one block to"
        " each.",
        "write parameters, uniform, type:NAME, or the blocks of each stage, as in 3,2",
        _partition,
    ),
    Rule(
        "pipeline-zero",
        "DeepSpeed's pipeline engine works with ZeRO 0 and 1; it asserts after the model is built.",
        "use stage 1, or pp 1",
        _pipeline_zero,
    ),
    Rule(
        "pipeline-bf16",
        "With a pipeline, bf16 and ZeRO-1, DeepSpeed adds up the micro batches' gradients in bf16"
        " unless told otherwise.",
        'write "data_types": {"grad_accum_dtype": "fp32"}',
        _pipeline_bf16,
    ),
    Rule(
        "pipeline-tied",
        "With a pipeline, sums in fp32 beside fp16, or beside bf16 and an offloaded optimizer, are"
        " kept where DeepSpeed does not look for a tied head's gradient: its two copies drift"
        " apart.",
        "write model.tied_head false, or train in bf16 without offload",
        _pipeline_tied,
    ),
    Rule(
        "pipeline-overlap",
        "DeepSpeed's pipeline engine turns overlapped communication off.",
        "delete it",
        _pipeline_overlap,
    ),
    Rule(
        "pipeline-timers",
        "With a pipeline DeepSpeed starts the timers of its breakdown and of its profiler twice,"
        " and asserts against that in the first step.",
        "turn it off",
        _pipeline_timers,
    ),
)
