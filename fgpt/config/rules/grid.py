"""Rules about the number of processes, the batch, and the model's shapes."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch, BatchError, solve
from fgpt.config.rules.context import Context, Finding, Rule
from fgpt.utils.keys import AUTO


def batch_of(ctx: Context) -> Batch:
    """The batch arithmetic of a context; BatchError where it does not hold."""
    given = {name: ctx.ds(name) for name in (GLOBAL, MICRO, ACCUMULATION)}
    number = {name: None if value == AUTO else value for name, value in given.items()}
    return solve(
        global_size=number[GLOBAL],
        micro=number[MICRO],
        accumulation=number[ACCUMULATION],
        world=ctx.world,
        tp=ctx.run("parallel.tp"),
        pp=ctx.run("parallel.pp"),
        cp=ctx.run("parallel.cp"),
    )


def sound_batch(ctx: Context) -> Batch | None:
    """The same; None where a rule of this file applies."""
    if ctx.world % _grid(ctx):
        return None
    try:
        return batch_of(ctx)
    except BatchError:
        return None


def _grid(ctx: Context) -> int:
    """Ranks that work on one micro batch."""
    return int(ctx.run("parallel.tp") * ctx.run("parallel.pp") * ctx.run("parallel.cp"))


def _world(ctx: Context) -> Iterator[Finding]:
    if ctx.world % _grid(ctx):
        sizes = " x ".join(f"{axis} {ctx.run(f'parallel.{axis}')}" for axis in ("tp", "pp", "cp"))
        yield Finding(
            "launch.processes",
            f"world {ctx.world} is not a multiple of {sizes} = {_grid(ctx)}"
            " (world = tp x pp x cp x dp)",
        )


def _triple(ctx: Context) -> Iterator[Finding]:
    if ctx.world % _grid(ctx):
        return
    try:
        batch_of(ctx)
    except BatchError as error:
        yield Finding(f"deepspeed.{GLOBAL}", error.what, error.fix)


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


RULES = (
    Rule(
        "world-grid",
        "The processes must fill the grid: world = tp x pp x cp x dp.",
        "start a multiple of tp x pp x cp processes, or change --tp / --pp / --cp",
        _world,
    ),
    Rule(
        "batch-triple",
        "global = micro x accumulation x dp must hold; DeepSpeed asserts it on every rank, and not"
        " at all under python -O.",
        "change one of the three, or leave it out",
        _triple,
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
)
