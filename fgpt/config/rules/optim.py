"""Rules about the optimizer and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.config.deepspeed.settings import value_at
from fgpt.config.rules import Context, Finding, rule
from fgpt.errors import Edit
from fgpt.optim.schedules import REQUIRED_PARAMS
from fgpt.utils.keys import AUTO

_PARAMS = "scheduler.params"


@rule("optimizer-untrained", "use AdamW")
def _not_trained(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed has this optimizer, but FGPT does not train with it."""
    optimizer = ctx.deepspeed.optimizer
    if optimizer and optimizer.refused:
        what = f"{optimizer.name}: {optimizer.refused}"
        yield Finding("deepspeed.optimizer.type", what, edits=_adamw_instead(ctx))


@rule("optimizer-package", "install it, or use AdamW")
def _package(ctx: Context) -> Iterator[Finding]:
    """The optimizer needs an optional package."""
    optimizer = ctx.deepspeed.optimizer
    if optimizer and optimizer.package and optimizer.package not in ctx.packages:
        what = f"{optimizer.name} needs the package {optimizer.package}, which is not installed"
        fix = f"pip install 'fgpt[{optimizer.package}]', or use AdamW"
        yield Finding("deepspeed.optimizer.type", what, fix, _adamw_instead(ctx))


@rule("optimizer-stage", "use AdamW, or change what it names")
def _stage(ctx: Context) -> Iterator[Finding]:
    """The optimizer does not work in this layout: at this ZeRO stage without offload, with tensor
    parallelism, or on this device.
    """
    optimizer = ctx.deepspeed.optimizer
    if not optimizer or optimizer.refused:
        return
    if optimizer.needs_whole_tensors and (tp := ctx.run("parallel.tp")) > 1:
        what = f"{optimizer.name} with tp {tp}, whose ranks do not have the norms of whole weights"
        yield Finding("deepspeed.optimizer.type", what, edits=_adamw_instead(ctx))
    if ctx.deepspeed.offloads_optimizer and "cpu" in optimizer.operators:
        return
    on_cuda = ctx.device == "cuda" and optimizer.cuda_stages is not None
    if ctx.stage not in ((optimizer.cuda_stages or ()) if on_cuda else optimizer.stages):
        what = f"{optimizer.name} with ZeRO-{ctx.stage}"
        what += "" if ctx.deepspeed.offloads_optimizer else " and no offload"
        what += f": {optimizer.why_stages}"
        yield Finding("deepspeed.optimizer.type", what, edits=_adamw_instead(ctx))


def _adamw_instead(ctx: Context) -> tuple[Edit, ...]:
    """Edits to AdamW with those of the present parameters that it takes."""
    names = ("lr", "betas", "eps", "weight_decay")
    # read unchecked: the parameters of an optimizer that FGPT does not know
    present = value_at(ctx.deepspeed.tree, "optimizer.params") or {}
    params = {name: present[name] for name in names if name in present} or {"lr": AUTO}
    return (Edit("deepspeed.optimizer", {"type": "AdamW", "params": params}),)


@rule("untested-optimizer", "FGPT allows it", "warning")
def _untested(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed asserts that ZeRO with an optimizer other than its own is allowed explicitly, by
    zero_allow_untested_optimizer.
    """
    optimizer = ctx.deepspeed.optimizer
    allowed = ctx.ds("zero_allow_untested_optimizer")
    if optimizer and optimizer.zero_untested and ctx.stage > 0 and not allowed:
        what = f"{optimizer.name} with ZeRO-{ctx.stage}"
        edits = (Edit("deepspeed.zero_allow_untested_optimizer", True),)
        yield Finding("deepspeed.optimizer.type", what, edits=edits)


@rule("untested-flag-idle", "dropped", "warning")
def _untested_idle(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed reads the key only for ZeRO with an optimizer other than its own."""
    optimizer = ctx.deepspeed.optimizer
    if not ctx.ds("zero_allow_untested_optimizer") or not optimizer:
        return
    if ctx.stage == 0 or not optimizer.zero_untested:
        what = f"true with {optimizer.name} and ZeRO-{ctx.stage}"
        yield Finding("deepspeed.zero_allow_untested_optimizer", what)


@rule("mup-optimizer", "choose Adam, AdamW, Adagrad, Lion or Muon, or leave model.mup_base out")
def _mup_optimizer(ctx: Context) -> Iterator[Finding]:
    """muP's learning rates suppose that the size of updates does not follow that of gradients, as
    SGD's does, or that of weights, as Lamb's does.
    """
    optimizer, where = ctx.deepspeed.optimizer, "run.model.mup_base"
    base = ctx.run("model.mup_base")
    if optimizer and base not in (None, ctx.run("model.d_model")) and not optimizer.has_mup:
        what = f"{base} with {optimizer.name}"
        yield Finding(where, what, edits=(Edit(where), Edit("run.model.mup_base_d_head")))


@rule("muon-rates", "DeepSpeed's defaults", "warning")
def _muon_rates(ctx: Context) -> Iterator[Finding]:
    """Without a rate, DeepSpeed's Muon takes 0.02 for matrices and 3e-4 for AdamW's part."""
    optimizer = ctx.deepspeed.optimizer
    if not optimizer or not optimizer.is_own or ctx.wrote("optimizer.params.lr"):
        return
    rates = {"optimizer.params.muon_lr": 0.02, "optimizer.params.adam_lr": 3e-4}
    absent = {path: rate for path, rate in rates.items() if ctx.ds(path) is None}
    if absent:
        fix = "DeepSpeed's: " + ", ".join(
            f"{p.rpartition('.')[2]} {r:g}" for p, r in absent.items()
        )
        edits = tuple(Edit(f"deepspeed.{path}", rate) for path, rate in absent.items())
        yield Finding("deepspeed.optimizer.params.lr", "is not written", fix, edits)


@rule("muon-lr-idle", "dropped", "warning")
def _muon_lr_idle(ctx: Context) -> Iterator[Finding]:
    """muon_lr and adam_lr together set the rates of all parameters, so lr is never used."""
    path = "optimizer.params.lr"
    both = [ctx.ds(f"optimizer.params.{name}") for name in ("muon_lr", "adam_lr")]
    if all(both) and ctx.wrote(path):
        what = f"{ctx.ds(path):g} with muon_lr {both[0]:g} and adam_lr {both[1]:g}"
        yield Finding(f"deepspeed.{path}", what, edits=(Edit(f"deepspeed.{path}"),))


@rule("scheduler-type", 'write "type": "WarmupCosineLR"')
def _scheduler_type(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed ignores a scheduler section without a type."""
    if ctx.wrote("scheduler") and not ctx.wrote("scheduler.type"):
        edits = (Edit("deepspeed.scheduler.type", "WarmupCosineLR"),)
        yield Finding("deepspeed.scheduler", "scheduler.type is missing", edits=edits)


@rule("scheduler-params", "write it")
def _required(ctx: Context) -> Iterator[Finding]:
    """The scheduler's parameter has no default, and DeepSpeed raises after the model is built."""
    kind = ctx.ds("scheduler.type")
    for name in REQUIRED_PARAMS.get(kind, ()):
        if not ctx.wrote(f"{_PARAMS}.{name}"):
            # the other end of the cycle, where it is written, is a valid value for this one
            value = ctx.ds(f"{_PARAMS}.cycle_max_lr") or ctx.ds(f"{_PARAMS}.cycle_min_lr") or 0.001
            edits = (Edit(f"deepspeed.{_PARAMS}.{name}", value),)
            fix = f'write "{name}": {value:g}'
            yield Finding(f"deepspeed.{_PARAMS}", f"{kind} without {name}", fix, edits)


@rule("schedule-too-short", 'kept; "auto" fits it to the run', "warning")
def _too_short(ctx: Context) -> Iterator[Finding]:
    """The schedule ends before the run, and the learning rate would stay at its minimum for the
    rest.
    """
    path, steps = f"{_PARAMS}.total_num_steps", ctx.run("train.steps")
    if ctx.wrote(path) and ctx.ds(path) < steps:
        what = f"{ctx.ds(path)} is less than train.steps {steps}"
        yield Finding(f"deepspeed.{path}", what, edits=())


@rule("warmup-too-long", 'kept; "auto" fits it to the run', "warning")
def _long_warmup(ctx: Context) -> Iterator[Finding]:
    """The run ends before the warm-up does, so the learning rate never reaches its peak."""
    path = f"{_PARAMS}.warmup_num_steps"
    if not ctx.wrote("scheduler.type") or not ctx.ds("scheduler.type").startswith("Warmup"):
        return
    total_path = f"{_PARAMS}.total_num_steps"
    # a run that ends before its schedule does was meant to
    total = ctx.ds(total_path) if ctx.wrote(total_path) else ctx.run("train.steps")
    warmup = ctx.ds(path)
    # a run of one or two steps is a smoke test, and an automatic warm-up has at least 2
    if warmup >= total and warmup > 2:
        written = "" if ctx.wrote(path) else " (DeepSpeed's default)"
        yield Finding(f"deepspeed.{path}", f"{warmup}{written} of {total} steps", edits=())


@rule("warmup-of-one", "read as 2", "warning")
def _one_warmup(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed silently changes a warm-up of no or one step to two."""
    path = f"{_PARAMS}.warmup_num_steps"
    if ctx.wrote(path) and ctx.ds(path) < 2:
        edits = (Edit(f"deepspeed.{path}", 2),)
        yield Finding(f"deepspeed.{path}", str(ctx.ds(path)), edits=edits)


@rule("lr-stated-twice", 'kept; "warmup_max_lr": "auto" takes optimizer.params.lr', "warning")
def _lr_twice(ctx: Context) -> Iterator[Finding]:
    """These schedules set the learning rate themselves and never read optimizer.params.lr (Muon's
    muon_lr).
    """
    kind, path = ctx.ds("scheduler.type"), f"{_PARAMS}.warmup_max_lr"
    own = "muon_lr" if ctx.ds("optimizer.params.muon_lr") else "lr"
    lr = ctx.ds(f"optimizer.params.{own}")
    if kind not in ("WarmupLR", "WarmupDecayLR") or lr is None:
        return
    fix = f'kept; "warmup_max_lr": "auto" takes optimizer.params.{own}'
    if ctx.wrote(path) and ctx.ds(path) != lr:
        what = f"{ctx.ds(path):g} is not optimizer.params.{own} {lr:g}, which is then never used"
        yield Finding(f"deepspeed.{path}", what, fix, edits=())
    if kind == "WarmupDecayLR" and not ctx.wrote(path) and lr != 1e-3:
        what = f"without it WarmupDecayLR peaks at 0.001, not at optimizer.params.{own} {lr:g}"
        yield Finding(f"deepspeed.{path}", what, fix, edits=())


@rule("muon-one-cycle", "read as false, as with DeepSpeed's Muon", "warning")
def _muon_one_cycle(ctx: Context) -> Iterator[Finding]:
    """DeepSpeed's OneCycle cycles betas: those of AdamW's part, not Muon's momentum."""
    optimizer, path = ctx.deepspeed.optimizer, f"{_PARAMS}.cycle_momentum"
    if ctx.ds("scheduler.type") == "OneCycle" and optimizer and optimizer.is_own and ctx.ds(path):
        written = "true" if ctx.wrote(path) else "true (DeepSpeed's default)"
        edits = (Edit(f"deepspeed.{path}", False),)
        yield Finding(f"deepspeed.{path}", f"{written} with {optimizer.name}", edits=edits)


@rule("lr-order", "exchange the two")
def _lr_order(ctx: Context) -> Iterator[Finding]:
    """The low end of a schedule must not be above its high end."""
    kind = ctx.ds("scheduler.type")
    for owner, low, high in (
        ("Warmup", "warmup_min_lr", "warmup_max_lr"),
        ("OneCycle", "cycle_min_lr", "cycle_max_lr"),
        ("OneCycle", "cycle_min_mom", "cycle_max_mom"),
    ):
        low, high = f"{_PARAMS}.{low}", f"{_PARAMS}.{high}"
        if not kind or not kind.startswith(owner) or not (ctx.wrote(low) and ctx.wrote(high)):
            continue
        if ctx.ds(low) > ctx.ds(high):
            what = f"{ctx.ds(low):g} is more than {high.rpartition('.')[2]} {ctx.ds(high):g}"
            edits = (
                Edit(f"deepspeed.{low}", ctx.ds(high)),
                Edit(f"deepspeed.{high}", ctx.ds(low)),
            )
            yield Finding(f"deepspeed.{low}", what, edits=edits)
