"""Rules about the optimizer and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.config.rules import Context, Finding, Rule
from fgpt.optim.schedules import REQUIRED_PARAMS

_PARAMS = "scheduler.params"


def _needed(ctx: Context) -> Iterator[Finding]:
    if not ctx.wrote("optimizer.type"):
        yield Finding("deepspeed.optimizer", "optimizer.type is missing")


def _not_trained(ctx: Context) -> Iterator[Finding]:
    optimizer = ctx.deepspeed.optimizer
    if optimizer and optimizer.refused:
        yield Finding("deepspeed.optimizer.type", f"{optimizer.name}: {optimizer.refused}")


def _stage(ctx: Context) -> Iterator[Finding]:
    optimizer = ctx.deepspeed.optimizer
    if not optimizer or optimizer.refused or ctx.deepspeed.offloads_optimizer:
        return
    if ctx.stage not in optimizer.stages:
        what = f"{optimizer.name} with ZeRO-{ctx.stage} and no offload: {optimizer.why_stages}"
        yield Finding("deepspeed.optimizer.type", what)


def _untested(ctx: Context) -> Iterator[Finding]:
    optimizer = ctx.deepspeed.optimizer
    allowed = ctx.ds("zero_allow_untested_optimizer")
    if optimizer and optimizer.zero_untested and ctx.stage > 0 and not allowed:
        what = f"{optimizer.name} with ZeRO-{ctx.stage}"
        yield Finding("deepspeed.optimizer.type", what)


def _untested_idle(ctx: Context) -> Iterator[Finding]:
    optimizer = ctx.deepspeed.optimizer
    if not ctx.ds("zero_allow_untested_optimizer") or not optimizer:
        return
    if ctx.stage == 0 or not optimizer.zero_untested:
        what = f"true with {optimizer.name} and ZeRO-{ctx.stage}"
        yield Finding("deepspeed.zero_allow_untested_optimizer", what)


def _scheduler_type(ctx: Context) -> Iterator[Finding]:
    if ctx.wrote("scheduler") and not ctx.wrote("scheduler.type"):
        yield Finding("deepspeed.scheduler", "scheduler.type is missing")


def _required(ctx: Context) -> Iterator[Finding]:
    kind = ctx.ds("scheduler.type")
    for name in REQUIRED_PARAMS.get(kind, ()):
        if not ctx.wrote(f"{_PARAMS}.{name}"):
            fix = f'write "{name}": ' + ('"auto"' if name == "total_num_steps" else "0.001")
            yield Finding(f"deepspeed.{_PARAMS}", f"{kind} without {name}", fix)


def _too_short(ctx: Context) -> Iterator[Finding]:
    path, steps = f"{_PARAMS}.total_num_steps", ctx.run("train.steps")
    if ctx.wrote(path) and ctx.ds(path) < steps:
        what = f"{ctx.ds(path)} is less than train.steps {steps}"
        yield Finding(f"deepspeed.{path}", what)


def _long_warmup(ctx: Context) -> Iterator[Finding]:
    path = f"{_PARAMS}.warmup_num_steps"
    if not ctx.wrote("scheduler.type") or not ctx.ds("scheduler.type").startswith("Warmup"):
        return
    total_path = f"{_PARAMS}.total_num_steps"
    total = ctx.run("train.steps")
    if ctx.wrote(total_path):
        total = min(total, ctx.ds(total_path))
    warmup = ctx.ds(path)
    # a run of one or two steps is a smoke test, and an automatic warm-up has at least 2
    if warmup >= total and warmup > 2:
        written = "" if ctx.wrote(path) else " (DeepSpeed's default)"
        yield Finding(f"deepspeed.{path}", f"{warmup}{written} of {total} steps")


def _one_warmup(ctx: Context) -> Iterator[Finding]:
    path = f"{_PARAMS}.warmup_num_steps"
    if ctx.wrote(path) and ctx.ds(path) == 1:
        yield Finding(f"deepspeed.{path}", "1")


def _lr_twice(ctx: Context) -> Iterator[Finding]:
    kind, path = ctx.ds("scheduler.type"), f"{_PARAMS}.warmup_max_lr"
    lr = ctx.ds("optimizer.params.lr")
    if kind not in ("WarmupLR", "WarmupDecayLR") or lr is None:
        return
    if ctx.wrote(path) and ctx.ds(path) != lr:
        what = f"{ctx.ds(path):g} is not optimizer.params.lr {lr:g}, which is then never used"
        yield Finding(f"deepspeed.{path}", what)
    if kind == "WarmupDecayLR" and not ctx.wrote(path) and lr != 1e-3:
        what = f"without it WarmupDecayLR peaks at 0.001, not at optimizer.params.lr {lr:g}"
        yield Finding(f"deepspeed.{path}", what)


def _lr_order(ctx: Context) -> Iterator[Finding]:
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
            yield Finding(f"deepspeed.{low}", what)


RULES = (
    Rule(
        "optimizer-needed",
        "FGPT builds the optimizer that the JSON names; without one there is nothing to train"
        " or to schedule.",
        'write "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}',
        _needed,
    ),
    Rule(
        "optimizer-untrained",
        "DeepSpeed has this optimizer, but FGPT does not train with it.",
        "use AdamW",
        _not_trained,
    ),
    Rule(
        "optimizer-stage",
        "The optimizer does not work at this ZeRO stage without offload.",
        "offload the optimizer to cpu, choose another stage, or use AdamW",
        _stage,
    ),
    Rule(
        "untested-optimizer",
        "DeepSpeed asserts that ZeRO with an optimizer other than its own is allowed explicitly.",
        'write "zero_allow_untested_optimizer": true',
        _untested,
    ),
    Rule(
        "untested-flag-idle",
        "DeepSpeed reads the key only for ZeRO with an optimizer other than its own.",
        "delete it",
        _untested_idle,
    ),
    Rule(
        "scheduler-type",
        "DeepSpeed ignores a scheduler section without a type.",
        'write "type": "WarmupCosineLR"',
        _scheduler_type,
    ),
    Rule(
        "scheduler-params",
        "The scheduler's parameter has no default, and DeepSpeed raises after the model is built.",
        "write it",
        _required,
    ),
    Rule(
        "schedule-too-short",
        "The schedule ends before the run, and the learning rate would stay at its minimum"
        " for the rest.",
        'write "total_num_steps": "auto"',
        _too_short,
    ),
    Rule(
        "warmup-too-long",
        "The run ends before the warm-up does.",
        'write "warmup_num_steps": "auto"',
        _long_warmup,
    ),
    Rule(
        "warmup-of-one",
        "DeepSpeed silently changes a warm-up of one step to two.",
        "write 2, or delete the scheduler",
        _one_warmup,
    ),
    Rule(
        "lr-stated-twice",
        "These schedules set the learning rate themselves and never read optimizer.params.lr.",
        'write "warmup_max_lr": "auto"',
        _lr_twice,
    ),
    Rule(
        "lr-order",
        "The low end of a schedule must not be above its high end.",
        "exchange the two",
        _lr_order,
    ),
)
