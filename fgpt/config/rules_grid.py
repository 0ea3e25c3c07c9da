"""Rules about the grid of ranks, the batch, and the model's shapes on them."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch, BatchError, solve
from fgpt.config.context import Context, Finding, Rule
from fgpt.config.keys import AUTO


def batch_of(ctx: Context) -> Batch:
    """The batch arithmetic of a context; BatchError where it does not hold."""
    given = {name: ctx.ds(name) for name in (GLOBAL, MICRO, ACCUMULATION)}
    number = {name: None if value == AUTO else value for name, value in given.items()}
    return solve(
        global_=number[GLOBAL],
        micro=number[MICRO],
        accumulation=number[ACCUMULATION],
        world=ctx.world,
        tp=ctx.run("parallel.tp"),
        pp=ctx.run("parallel.pp"),
        cp=ctx.run("parallel.cp"),
    )


def _divides_world(ctx: Context) -> bool:
    return bool(ctx.world % (ctx.run("parallel.tp") * ctx.run("parallel.pp")) == 0)


def _world(ctx: Context) -> Iterator[Finding]:
    tp, pp = ctx.run("parallel.tp"), ctx.run("parallel.pp")
    if not _divides_world(ctx):
        yield Finding(
            "launch.processes",
            f"world {ctx.world} is not a multiple of tp {tp} x pp {pp} = {tp * pp}"
            " (world = tp x pp x dp)",
        )


def _no_engine(ctx: Context) -> Iterator[Finding]:
    for axis in ("tp", "pp"):
        size = ctx.run(f"parallel.{axis}")
        if size > 1:
            yield Finding(f"run.parallel.{axis}", f"{axis} is {size}")


def _triple(ctx: Context) -> Iterator[Finding]:
    if not _divides_world(ctx):
        return
    try:
        batch_of(ctx)
    except BatchError as error:
        yield Finding(f"deepspeed.{GLOBAL}", error.what, error.fix)


def _heads_over_tp(ctx: Context) -> Iterator[Finding]:
    tp = ctx.run("parallel.tp")
    for name in ("n_head", "n_kv_head"):
        heads = ctx.run(f"model.{name}")
        if heads % tp:
            yield Finding(f"run.model.{name}", f"{heads} is not a multiple of tp {tp}")


def _vocab_over_tp(ctx: Context) -> Iterator[Finding]:
    tp, vocab = ctx.run("parallel.tp"), ctx.run("model.vocab_size")
    if vocab % tp:
        yield Finding("run.model.vocab_size", f"{vocab} is not a multiple of tp {tp}")


def _layers_over_pp(ctx: Context) -> Iterator[Finding]:
    pp, layers = ctx.run("parallel.pp"), ctx.run("model.n_layer")
    if layers < pp:
        yield Finding("run.parallel.pp", f"{pp} stages for n_layer {layers}")


def _head_width(ctx: Context) -> Iterator[Finding]:
    width, heads = ctx.run("model.d_model"), ctx.run("model.n_head")
    if "run.model.d_head" in ctx.derived and width % heads:
        yield Finding("run.model.n_head", f"d_model {width} is not a multiple of n_head {heads}")


def _kv_heads(ctx: Context) -> Iterator[Finding]:
    heads, shared = ctx.run("model.n_head"), ctx.run("model.n_kv_head")
    if heads % shared:
        yield Finding("run.model.n_kv_head", f"n_head {heads} is not a multiple of {shared}")


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


def _pipeline_zero(ctx: Context) -> Iterator[Finding]:
    pp = ctx.run("parallel.pp")
    if pp > 1 and ctx.stage >= 2:
        yield Finding("deepspeed.zero_optimization.stage", f"stage {ctx.stage} with pp {pp}")


def _pipeline_clipping(ctx: Context) -> Iterator[Finding]:
    pp, clip = ctx.run("parallel.pp"), ctx.ds("gradient_clipping")
    if pp > 1 and clip > 0 and ctx.stage == 0 and ctx.precision == "fp32":
        yield Finding("deepspeed.gradient_clipping", f"{clip:g} with pp {pp}, fp32 and ZeRO-0")


def _pipeline_bf16(ctx: Context) -> Iterator[Finding]:
    pp, dtype = ctx.run("parallel.pp"), ctx.ds("data_types.grad_accum_dtype")
    if pp > 1 and ctx.precision == "bf16" and ctx.stage == 1 and dtype != "fp32":
        yield Finding("deepspeed.data_types.grad_accum_dtype", f"{dtype} with pp {pp} and ZeRO-1")


RULES = (
    Rule(
        "world-grid",
        "The processes must fill the grid: world = tp x pp x dp.",
        "start a multiple of tp x pp processes, or change --tp / --pp",
        _world,
    ),
    Rule(
        "no-tensor-pipeline-yet",
        "This build has no tensor or pipeline engine yet.",
        "leave tp and pp at 1",
        _no_engine,
    ),
    Rule(
        "batch-triple",
        "global = micro x accumulation x dp must hold; DeepSpeed asserts it on every rank, and not"
        " at all under python -O.",
        "change one of the three, or leave it out",
        _triple,
    ),
    Rule(
        "heads-over-tp",
        "Tensor parallelism gives each rank whole heads.",
        "choose tp that divides n_head and n_kv_head",
        _heads_over_tp,
    ),
    Rule(
        "vocab-over-tp",
        "The embedding is split by rows, equally on all tensor-parallel ranks.",
        "round model.vocab_size up to a multiple of tp",
        _vocab_over_tp,
    ),
    Rule(
        "layers-over-pp",
        "A pipeline stage needs a block.",
        "use at most n_layer stages",
        _layers_over_pp,
    ),
    Rule(
        "head-width",
        "Without model.d_head a head is d_model / n_head wide, which must be whole.",
        "write model.d_head, or choose n_head that divides d_model",
        _head_width,
    ),
    Rule(
        "kv-heads",
        "Each key/value head serves equally many query heads.",
        "choose n_kv_head that divides n_head",
        _kv_heads,
    ),
    Rule(
        "rotary-width",
        "Rotary positions turn pairs of elements, so d_head must be even.",
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
        "A learned or sinusoidal table has max_seq_len rows and no more.",
        "shorten data.seq_len or raise model.max_seq_len",
        _sequence,
    ),
    Rule(
        "pipeline-zero",
        "DeepSpeed's pipeline engine works with ZeRO 0 and 1; it asserts after the model is built.",
        "use stage 1, or pp 1",
        _pipeline_zero,
    ),
    Rule(
        "pipeline-clipping",
        "With a pipeline, fp32 and ZeRO-0, DeepSpeed counts the gradients of the first stage only"
        " into the norm it clips by.",
        "use ZeRO stage 1",
        _pipeline_clipping,
    ),
    Rule(
        "pipeline-bf16",
        "With a pipeline, bf16 and ZeRO-1, DeepSpeed adds up the micro batches' gradients in bf16"
        " unless told otherwise.",
        'write "data_types": {"grad_accum_dtype": "fp32"}',
        _pipeline_bf16,
    ),
)
