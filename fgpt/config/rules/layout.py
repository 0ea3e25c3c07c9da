"""Rules about the processes, the batch, the model's shapes, and parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch, BatchError, solve
from fgpt.config.deepspeed.settings import GRAD_ACCUM_DTYPE
from fgpt.config.field_syntax import (
    BY_LAYERS,
    BY_PARAMETERS,
    BY_TYPE,
    has_type,
    layer_classes,
    parse_blocks,
)
from fgpt.config.rules import Context, Finding, Rule
from fgpt.utils.keys import AUTO, did_you_mean


def batch_of(ctx: Context) -> Batch:
    """Return the batch arithmetic. Raises BatchError where the numbers contradict each other."""
    written = {name: ctx.ds(name) for name in (GLOBAL, MICRO, ACCUMULATION)}
    number = {name: None if value == AUTO else value for name, value in written.items()}
    return solve(
        global_size=number[GLOBAL],
        micro=number[MICRO],
        accumulation=number[ACCUMULATION],
        world=ctx.world,
        tp=ctx.run("parallel.tp"),
        pp=ctx.run("parallel.pp"),
        cp=ctx.run("parallel.cp"),
    )


def valid_batch(ctx: Context) -> Batch | None:
    """Return the batch arithmetic, or None where world-grid or batch-triple applies."""
    if ctx.world % _ranks(ctx, "tp", "pp", "cp")[0]:
        return None
    try:
        return batch_of(ctx)
    except BatchError:
        return None


def _world(ctx: Context) -> Iterator[Finding]:
    tp, pp, cp = (ctx.run(f"parallel.{axis}") for axis in ("tp", "pp", "cp"))
    if ctx.world % (tp * pp * cp):
        product = f"tp {tp} x pp {pp} x cp {cp} = {tp * pp * cp}"
        what = f"world {ctx.world} is not a multiple of {product} (world = tp x pp x cp x dp)"
        yield Finding("launch.processes", what)


def _triple(ctx: Context) -> Iterator[Finding]:
    if ctx.world % _ranks(ctx, "tp", "pp", "cp")[0]:
        return
    try:
        batch_of(ctx)
    except BatchError as error:
        yield Finding(f"deepspeed.{GLOBAL}", error.what, error.fix)


def _head_width(ctx: Context) -> Iterator[Finding]:
    width, heads = ctx.run("model.d_model"), ctx.run("model.n_head")
    if "model.d_head" in ctx.derived and width % heads:
        yield Finding("run.model.n_head", f"d_model {width} is not a multiple of n_head {heads}")


def _kv_heads(ctx: Context) -> Iterator[Finding]:
    heads, kv_heads = ctx.run("model.n_head"), ctx.run("model.n_kv_head")
    if heads % kv_heads:
        yield Finding("run.model.n_kv_head", f"n_head {heads} is not a multiple of {kv_heads}")


def _rotary(ctx: Context) -> Iterator[Finding]:
    width = ctx.run("model.d_head")
    if ctx.run("model.position") == "rotary" and width % 2:
        yield Finding("run.model.d_head", f"{width} is odd")


def _sinusoidal(ctx: Context) -> Iterator[Finding]:
    width = ctx.run("model.d_model")
    if ctx.run("model.position") == "sinusoidal" and width % 2:
        yield Finding("run.model.d_model", f"{width} is odd")


def _sequence(ctx: Context) -> Iterator[Finding]:
    length, rows = ctx.run("data.seq_len"), ctx.run("model.max_seq_len")
    if ctx.run("model.position") in ("learned", "sinusoidal") and length > rows:
        yield Finding("run.data.seq_len", f"{length} is more than model.max_seq_len {rows}")


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
    """The product of the axes' sizes, and its text: `tp 2 x cp 2 = 4`."""
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
    blocks, what, fix = parse_blocks(text), "", ""
    if text == BY_PARAMETERS:
        return
    if pp == 1:
        what, fix = f"{text!r} with pp 1, where nothing is divided", "delete it"
    elif blocks is not None:
        what = _blocks_error(blocks, pp, ctx.run("model.n_layer"))
    elif text.startswith(BY_TYPE):
        what = _type_error(text, layer_classes(ctx.run("model")))
    elif text != BY_LAYERS:
        guess = did_you_mean(text, (BY_PARAMETERS, BY_LAYERS, BY_TYPE + "Block"))
        what = f"{text!r} is not a way to divide layers{guess}"
    if what:
        yield Finding("run.parallel.partition", what, fix)


def _blocks_error(blocks: list[int], pp: int, layers: int) -> str:
    shown = ",".join(map(str, blocks))
    if len(blocks) != pp:
        return f"{shown} is for {len(blocks)} stage(s), pp is {pp}"
    if 0 in blocks:
        return f"{shown} leaves stage {blocks.index(0)} without a block"
    if sum(blocks) != layers:
        return f"{shown} are {sum(blocks)} blocks, n_layer is {layers}"
    return ""


def _type_error(text: str, classes: list[str]) -> str:
    if text != BY_TYPE and any(has_type(name, text) for name in classes):
        return ""
    return f"{text!r} matches no layer; there are {', '.join(dict.fromkeys(classes))}"


def _pipeline_zero(ctx: Context) -> Iterator[Finding]:
    pp = ctx.run("parallel.pp")
    if pp > 1 and ctx.stage >= 2:
        yield Finding("deepspeed.zero_optimization.stage", f"stage {ctx.stage} with pp {pp}")


def _pipeline_bf16(ctx: Context) -> Iterator[Finding]:
    pp, dtype = ctx.run("parallel.pp"), ctx.ds(GRAD_ACCUM_DTYPE)
    if pp > 1 and ctx.deepspeed.precision == "bf16" and ctx.stage == 1 and dtype != "fp32":
        what = f"{dtype or 'not written'} with pp {pp} and ZeRO-1"
        yield Finding(f"deepspeed.{GRAD_ACCUM_DTYPE}", what)


def _pipeline_tied(ctx: Context) -> Iterator[Finding]:
    precision, offload = ctx.deepspeed.precision, ctx.deepspeed.offloads_optimizer
    if ctx.run("parallel.pp") == 1 or not ctx.run("model.tied_head") or precision == "fp32":
        return
    if ctx.ds(GRAD_ACCUM_DTYPE) == "fp32" and (precision == "fp16" or offload):
        what = f"fp32 with {precision}{' and offload_optimizer' if offload else ''} and a tied head"
        yield Finding(f"deepspeed.{GRAD_ACCUM_DTYPE}", what)


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
        "world-grid",
        "The processes must fill the grid: world = tp x pp x cp x dp.",
        "start a multiple of tp x pp x cp processes, or change --tp / --pp / --cp",
        _world,
    ),
    Rule(
        "batch-triple",
        "DeepSpeed requires global = micro x accumulation x dp, but only asserts it, and not"
        " at all under python -O.",
        "change one of the three, or leave it out",
        _triple,
    ),
    Rule(
        "head-width",
        "Without model.d_head, a head is d_model / n_head wide, which must be a whole number.",
        "write model.d_head, or choose n_head that divides d_model",
        _head_width,
    ),
    Rule(
        "kv-heads",
        "Every key/value head serves the same number of query heads.",
        "choose n_kv_head that divides n_head",
        _kv_heads,
    ),
    Rule(
        "rotary-width",
        "Rotary positions rotate pairs of elements, so d_head must be even.",
        "choose an even d_head",
        _rotary,
    ),
    Rule(
        "sinusoidal-width",
        "Sinusoidal positions are pairs of sine and cosine, so d_model must be even.",
        "choose an even d_model",
        _sinusoidal,
    ),
    Rule(
        "sequence-too-long",
        "A learned or sinusoidal position table has max_seq_len rows.",
        "shorten data.seq_len or raise model.max_seq_len",
        _sequence,
    ),
    Rule(
        "heads-over-tp",
        "Tensor parallelism gives each rank whole heads, and context parallelism divides"
        " these among its ranks during attention.",
        "choose tp x cp that divides n_head and n_kv_head",
        _heads_over_tp,
    ),
    Rule(
        "ff-over-tp",
        "Tensor parallelism divides the hidden elements of the MLP evenly among its ranks.",
        "choose tp that divides d_ff",
        _ff_over_tp,
    ),
    Rule(
        "sequence-over-ranks",
        "Context parallelism divides the tokens of a sample evenly among its ranks;"
        " parallel.sequence divides each rank's tokens evenly among the tensor-parallel ranks.",
        "change data.seq_len, or --cp / --tp",
        _sequence_over_ranks,
    ),
    Rule(
        "sequence-needs-tp",
        "Sequence parallelism divides the work that tensor-parallel ranks would repeat; with"
        " tp 1 no work is repeated.",
        "raise tp, or leave parallel.sequence out",
        _sequence_needs_tp,
    ),
    Rule(
        "layers-over-pp",
        "Every pipeline stage needs at least one block.",
        "use at most n_layer stages",
        _layers_over_pp,
    ),
    Rule(
        "partition-text",
        "parallel.partition divides the blocks among the pipeline stages, at least one to each.",
        "write parameters, uniform, type:NAME, or the blocks of each stage, as in 3,2",
        _partition,
    ),
    Rule(
        "pipeline-zero",
        "DeepSpeed's pipeline engine works with ZeRO 0 and 1 only, which it asserts after the"
        " model is built.",
        "use stage 1, or pp 1",
        _pipeline_zero,
    ),
    Rule(
        "pipeline-bf16",
        "With a pipeline, bf16 and ZeRO-1, DeepSpeed adds up the micro-batches' gradients in"
        " bf16 by default.",
        'write "data_types": {"grad_accum_dtype": "fp32"}',
        _pipeline_bf16,
    ),
    Rule(
        "pipeline-tied",
        "With a pipeline and fp32 gradient accumulation in fp16 (or in bf16 with an offloaded"
        " optimizer), DeepSpeed misses the tied head's gradient and its two copies diverge.",
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
        "With a pipeline, DeepSpeed starts the timers of its breakdown and its profiler"
        " twice, and an assertion fails in the first step.",
        "turn it off",
        _pipeline_timers,
    ),
)
