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
    parse_ramp,
    ramp_error,
)
from fgpt.config.rules import Context, Finding, rule
from fgpt.errors import Edit
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


@rule("world-grid", "start a multiple of tp x pp x cp processes, or change --tp / --pp / --cp")
def _world(ctx: Context) -> Iterator[Finding]:
    """The processes must fill the grid: world = tp x pp x cp x dp."""
    tp, pp, cp = (ctx.run(f"parallel.{axis}") for axis in ("tp", "pp", "cp"))
    if ctx.world % (tp * pp * cp):
        product = f"tp {tp} x pp {pp} x cp {cp} = {tp * pp * cp}"
        what = f"world {ctx.world} is not a multiple of {product} (world = tp x pp x cp x dp)"
        yield Finding("launch.processes", what)


@rule("batch-triple", "change one of the three, or leave it out")
def _triple(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed requires global = micro x accumulation x dp, but only asserts it, and not at all
    under python -O.
    """
    if ctx.world % _ranks(ctx, "tp", "pp", "cp")[0]:
        return
    try:
        batch_of(ctx)
    except BatchError as error:
        edits = tuple(Edit(f"deepspeed.{name}", n) for name, n in error.nearest.items())
        yield Finding(f"deepspeed.{GLOBAL}", error.what, error.fix, edits)


@rule("batch-ramp", "write STEP:BATCH,..., as 0:64,100:128, or leave it out")
def _batch_ramp(ctx: Context) -> Iterator[Finding]:
    """train.batch_ramp ascends from step 0 to the global batch of the DeepSpeed JSON, and the ranks
    divide each of its batches into their micro-batches.
    """
    where, text, batch = "run.train.batch_ramp", ctx.run("train.batch_ramp"), valid_batch(ctx)
    if text is None:
        return
    edits = (Edit(where),)
    if error := ramp_error(text):
        yield Finding(where, error, edits=edits)
    elif batch is not None:
        parts, unit = parse_ramp(text), batch.micro * batch.dp
        product = f"micro {batch.micro} x dp {batch.dp} = {unit}"
        for _, size in parts:
            if size % unit:
                what = f"{size} is not a multiple of {product}"
                fix = f"write multiples of {unit}, or a smaller --micro_batch"
                yield Finding(where, what, fix, edits)
        if (last := parts[-1][1]) != batch.global_size:
            what = f"ends at {last}, the global batch is {batch.global_size}"
            fix = f"end at {batch.global_size}, or set --global_batch {last}"
            yield Finding(where, what, fix, edits)


@rule("head-width", "write model.d_head, or choose n_head that divides d_model")
def _head_width(ctx: Context) -> Iterator[Finding]:
    """Without model.d_head, a head is d_model / n_head wide, which must be a whole number."""
    width, heads = ctx.run("model.d_model"), ctx.run("model.n_head")
    if "model.d_head" in ctx.derived and width % heads:
        what = f"d_model {width} is not a multiple of n_head {heads}"
        yield Finding("run.model.n_head", what, edits=(Edit("run.model.n_head", 1),))


@rule("kv-heads", "choose n_kv_head that divides n_head")
def _kv_heads(ctx: Context) -> Iterator[Finding]:
    """Every key/value head serves the same number of query heads."""
    heads, kv_heads = ctx.run("model.n_head"), ctx.run("model.n_kv_head")
    if heads % kv_heads:
        what = f"n_head {heads} is not a multiple of {kv_heads}"
        yield Finding("run.model.n_kv_head", what, edits=(Edit("run.model.n_kv_head", heads),))


@rule("rotary-width", "choose an even d_head")
def _rotary(ctx: Context) -> Iterator[Finding]:
    """Rotary positions rotate pairs of elements, so d_head must be even."""
    width = ctx.run("model.d_head")
    if ctx.run("model.position") == "rotary" and width % 2:
        where = "run.model.d_head"
        yield Finding(where, f"{width} is odd", edits=(Edit(where, width + 1),))


@rule("sinusoidal-width", "choose an even d_model")
def _sinusoidal(ctx: Context) -> Iterator[Finding]:
    """Sinusoidal positions are pairs of sine and cosine, so d_model must be even."""
    width = ctx.run("model.d_model")
    if ctx.run("model.position") == "sinusoidal" and width % 2:
        where = "run.model.d_model"
        yield Finding(where, f"{width} is odd", edits=(Edit(where, width + 1),))


@rule("pattern-needs-window", "set model.window, or leave model.window_pattern out")
def _pattern(ctx: Context) -> Iterator[Finding]:
    """model.window_pattern says which blocks have no window; without model.window none has one."""
    pattern, where = ctx.run("model.window_pattern"), "run.model.window_pattern"
    if pattern is not None and ctx.run("model.window") is None:
        yield Finding(where, f"{pattern} without model.window", edits=(Edit(where),))


@rule("mup-needs-base", "set model.mup_base below d_model, or leave model.mup_base_d_head out")
def _mup_base(ctx: Context) -> Iterator[Finding]:
    """model.mup_base_d_head describes the narrower model of muP: without model.mup_base there is
    none, and a model of the same width has the same heads.
    """
    width, where = ctx.run("model.mup_base_d_head"), "run.model.mup_base_d_head"
    base = ctx.run("model.mup_base")
    if width is not None and base is None:
        yield Finding(where, f"{width} without model.mup_base", edits=(Edit(where),))
    elif width not in (None, ctx.run("model.d_head")) and base == ctx.run("model.d_model"):
        what = f"{width} with model.mup_base {base}, which is d_model"
        yield Finding(where, what, edits=(Edit(where),))


@rule("sequence-too-long", "shorten data.seq_len or raise model.max_seq_len")
def _sequence(ctx: Context) -> Iterator[Finding]:
    """A learned or sinusoidal position table has max_seq_len rows."""
    length, rows = ctx.run("data.seq_len"), ctx.run("model.max_seq_len")
    if ctx.run("model.position") in ("learned", "sinusoidal") and length > rows:
        where, what = "run.data.seq_len", f"{length} is more than model.max_seq_len {rows}"
        yield Finding(where, what, edits=(Edit(where, rows),))


@rule("heads-over-tp", "choose tp x cp that divides n_head and n_kv_head")
def _heads_over_tp(ctx: Context) -> Iterator[Finding]:
    """Tensor parallelism gives each rank whole heads, and context parallelism divides these among
    its ranks during attention.
    """
    ranks, sizes = _ranks(ctx, "tp", "cp")
    edits = Edit("run.parallel.tp", 1), Edit("run.parallel.cp", 1)
    for name in ("n_head", "n_kv_head"):
        heads = ctx.run(f"model.{name}")
        if heads % ranks:
            what = f"{heads} is not a multiple of {sizes}"
            yield Finding(f"run.model.{name}", what, edits=edits)


@rule("ff-over-tp", "choose tp that divides d_ff")
def _ff_over_tp(ctx: Context) -> Iterator[Finding]:
    """Tensor parallelism divides the hidden elements of the MLP evenly among its ranks."""
    tp, width = ctx.run("parallel.tp"), ctx.run("model.d_ff")
    if width % tp:
        what = f"{width} is not a multiple of tp {tp}"
        yield Finding("run.model.d_ff", what, edits=(Edit("run.parallel.tp", 1),))


@rule("sequence-over-ranks", "change data.seq_len, or --cp / --tp")
def _sequence_over_ranks(ctx: Context) -> Iterator[Finding]:
    """Context parallelism divides the tokens of a sample evenly among its ranks; parallel.sequence
    divides each rank's tokens evenly among the tensor-parallel ranks.
    """
    axes = ("cp", "tp") if ctx.run("parallel.sequence") else ("cp",)
    length, (ranks, sizes) = ctx.run("data.seq_len"), _ranks(ctx, *axes)
    if length % ranks:
        where, what = "run.data.seq_len", f"{length} is not a multiple of {sizes}"
        shorter = length // ranks * ranks
        edits = (Edit(where, shorter),) if shorter else ()
        yield Finding(where, what, edits=edits)


def _ranks(ctx: Context, *axes: str) -> tuple[int, str]:
    """The product of the axes' sizes, and its text: `tp 2 x cp 2 = 4`."""
    sizes = {axis: ctx.run(f"parallel.{axis}") for axis in axes}
    product = math.prod(sizes.values())
    named = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    return product, " x ".join(named) + (f" = {product}" if len(named) > 1 else "")


@rule("sequence-needs-tp", "raise tp, or leave parallel.sequence out")
def _sequence_needs_tp(ctx: Context) -> Iterator[Finding]:
    """Sequence parallelism divides the work that tensor-parallel ranks would repeat; with tp 1 no
    work is repeated.
    """
    if ctx.run("parallel.sequence") and ctx.run("parallel.tp") == 1:
        where = "run.parallel.sequence"
        yield Finding(where, "true with tp 1", edits=(Edit(where),))


@rule("layers-over-pp", "use at most n_layer stages")
def _layers_over_pp(ctx: Context) -> Iterator[Finding]:
    """Every pipeline stage needs at least one block."""
    pp, layers = ctx.run("parallel.pp"), ctx.run("model.n_layer")
    if layers < pp:
        where, what = "run.parallel.pp", f"{pp} stages for n_layer {layers}"
        yield Finding(where, what, edits=(Edit(where, layers),))


@rule(
    "partition-text",
    "write parameters, uniform, type:NAME, or the blocks of each stage, as in 3,2",
)
def _partition(ctx: Context) -> Iterator[Finding]:
    """parallel.partition divides the blocks among the pipeline stages, at least one to each."""
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
        where = "run.parallel.partition"
        yield Finding(where, what, fix, edits=(Edit(where),))


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


@rule("pipeline-zero", "use stage 1, or pp 1")
def _pipeline_zero(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed's pipeline engine works with ZeRO 0 and 1 only, which it asserts after the model is
    built.
    """
    pp = ctx.run("parallel.pp")
    if pp > 1 and ctx.stage >= 2:
        where = "deepspeed.zero_optimization.stage"
        yield Finding(where, f"stage {ctx.stage} with pp {pp}", edits=(Edit(where, 1),))


@rule("pipeline-bf16", "added up in fp32", "warning")
def _pipeline_bf16(ctx: Context) -> Iterator[Finding]:
    """With a pipeline, bf16 and ZeRO-1, DeepSpeed adds up the micro-batches' gradients in bf16 by
    default.
    """
    pp, dtype = ctx.run("parallel.pp"), ctx.ds(GRAD_ACCUM_DTYPE)
    if ctx.is_plain:
        return
    if pp > 1 and ctx.deepspeed.precision == "bf16" and ctx.stage == 1 and dtype != "fp32":
        where, what = f"deepspeed.{GRAD_ACCUM_DTYPE}", f"{dtype or 'not written'} with pp {pp}"
        yield Finding(where, f"{what} and ZeRO-1", edits=(Edit(where, "fp32"),))


@rule("pipeline-tied", "write model.tied_head false, or train in bf16 without offload")
def _pipeline_tied(ctx: Context) -> Iterator[Finding]:
    """With a pipeline and fp32 gradient accumulation in fp16 (or in bf16 with an offloaded
    optimizer), DeepSpeed misses the tied head's gradient and its two copies diverge.
    """
    precision, offload = ctx.deepspeed.precision, ctx.deepspeed.offloads_optimizer
    if ctx.run("parallel.pp") == 1 or not ctx.run("model.tied_head") or precision == "fp32":
        return
    if ctx.ds(GRAD_ACCUM_DTYPE) == "fp32" and (precision == "fp16" or offload):
        what = f"fp32 with {precision}{' and offload_optimizer' if offload else ''} and a tied head"
        edits = (Edit("run.model.tied_head", False),)
        yield Finding(f"deepspeed.{GRAD_ACCUM_DTYPE}", what, edits=edits)


@rule("pipeline-overlap", "dropped", "warning")
def _pipeline_overlap(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed's pipeline engine turns overlapped communication off."""
    path, pp = "zero_optimization.overlap_comm", ctx.run("parallel.pp")
    if pp > 1 and ctx.ds(path):
        yield Finding(f"deepspeed.{path}", f"true with pp {pp}")


@rule("pipeline-timers", "turned off", "warning")
def _pipeline_timers(ctx: Context) -> Iterator[Finding]:
    """With a pipeline, DeepSpeed starts the timers of its breakdown and its profiler twice, and an
    assertion fails in the first step.
    """
    pp = ctx.run("parallel.pp")
    for path in ("wall_clock_breakdown", "flops_profiler.enabled"):
        if pp > 1 and ctx.ds(path):
            where = f"deepspeed.{path}"
            yield Finding(where, f"true with pp {pp}", edits=(Edit(where, False),))
