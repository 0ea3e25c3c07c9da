"""Rules about the run file's schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from fgpt.config.rules import Context, Finding, rule
from fgpt.config.schema import ScheduleConfig
from fgpt.errors import Edit
from fgpt.utils.keys import shown

_SCHEDULE = "run.schedule"


@rule(
    "schedule-stated-twice",
    "keep one: remove the JSON's (--ds_set scheduler=null), or leave schedule.kind out",
)
def _schedule_twice(ctx: Context) -> Iterator[Finding]:
    """The run file's schedule and the DeepSpeed JSON's scheduler both set the learning rate."""
    kind = ctx.run("schedule.kind")
    if kind != "deepspeed" and ctx.wrote("scheduler"):
        what = f"{ctx.ds('scheduler.type')}, and schedule.kind of the run file is {kind}"
        yield Finding("deepspeed.scheduler", what)


_OF_EVERY_KIND = (
    "warmup_steps",
    "total_steps",
    "momentum_warmup_steps",
    "momentum_start",
    "weight_decay",
)
_FIELDS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "deepspeed": (),
    "wsd": (*_OF_EVERY_KIND, "decay_steps", "decay_shape", "min_ratio"),
    "cosine": (*_OF_EVERY_KIND, "min_ratio"),
    "linear": (*_OF_EVERY_KIND, "min_ratio"),
    "constant": _OF_EVERY_KIND,
}


@rule("schedule-fields", "leave it out, or write schedule.kind wsd, which reads it")
def _schedule_fields(ctx: Context) -> Iterator[Finding]:
    """The schedule of this kind does not read it: with kind deepspeed the JSON's scheduler has its
    own keys, cosine and linear decay from the warm-up on, and constant does not decay.
    """
    kind = ctx.run("schedule.kind")
    for field in fields(ScheduleConfig):
        path = f"schedule.{field.name}"
        is_written = ctx.run(path) != field.default and path not in ctx.derived
        if is_written and field.name not in ("kind", *_FIELDS_OF_KIND[kind]):
            what = f"{shown(ctx.run(path))} with schedule.kind {kind}"
            yield Finding(f"run.{path}", what, edits=(Edit(f"run.{path}"),))


@rule("schedule-parts", "write fewer steps, or a longer schedule")
def _schedule_parts(ctx: Context) -> Iterator[Finding]:
    """The warm-up and the decay of a schedule must fit into its steps: train.steps, if
    schedule.total_steps does not say otherwise.
    """
    if ctx.run("schedule.kind") == "deepspeed":
        return
    total = ctx.run("schedule.total_steps")
    parts = {name: ctx.run(f"schedule.{name}") for name in ("warmup_steps", "decay_steps")}
    if (needed := sum(parts.values())) > total:
        written = [name for name in parts if f"schedule.{name}" not in ctx.derived]
        text = " + ".join(f"{name} {steps}" for name, steps in parts.items() if steps)
        what = f"{text} of {total} steps"
        fix = f"write fewer steps, or schedule.total_steps {needed}, of which this run is a part"
        edits = (Edit(f"{_SCHEDULE}.total_steps", needed),)
        yield Finding(f"{_SCHEDULE}.{written[0]}", what, fix, edits)


@rule("schedule-ends-early", "leave it out: the schedule is then as long as the run")
def _schedule_ends_early(ctx: Context) -> Iterator[Finding]:
    """The run would train its last steps at the end of the schedule's decay, by default at rate 0,
    or without weight decay.
    """
    if not ctx.run("schedule.decay_steps") and ctx.run("schedule.weight_decay") != "linear":
        return
    total, steps = ctx.run("schedule.total_steps"), ctx.run("train.steps")
    if total is not None and total < steps:
        where, what = f"{_SCHEDULE}.total_steps", f"{total} is less than train.steps {steps}"
        yield Finding(where, what, edits=(Edit(where),))


@rule("momentum-warmup", "leave it out")
def _momentum_warmup(ctx: Context) -> Iterator[Finding]:
    """A warm-up of the momentum has a number of steps, and ends at the momentum of an optimizer
    that has one: `momentum`, or beta1.
    """
    if ctx.run("schedule.kind") == "deepspeed":
        return
    where, steps = f"{_SCHEDULE}.momentum_warmup_steps", ctx.run("schedule.momentum_warmup_steps")
    start, optimizer = ctx.run("schedule.momentum_start"), ctx.deepspeed.optimizer
    if not steps and start is not None:
        where, what = f"{_SCHEDULE}.momentum_start", f"{start:g} without momentum_warmup_steps"
        yield Finding(where, what, edits=(Edit(where),))
    has_momentum = any(ctx.ds(f"optimizer.params.{name}") for name in ("momentum", "betas"))
    if steps and optimizer and not has_momentum:
        what = f"{steps} with {optimizer.name}, whose optimizer.params have no momentum"
        yield Finding(where, what, edits=(Edit(where), Edit(f"{_SCHEDULE}.momentum_start")))


@rule("weight-decay-schedule", "write an optimizer.params.weight_decay, or leave it out")
def _weight_decay_schedule(ctx: Context) -> Iterator[Finding]:
    """The schedule multiplies the optimizer's weight decay, which is 0."""
    kind, decay = ctx.run("schedule.weight_decay"), ctx.ds("optimizer.params.weight_decay")
    if ctx.run("schedule.kind") != "deepspeed" and kind != "constant" and not decay:
        where = f"{_SCHEDULE}.weight_decay"
        yield Finding(where, f"{kind} with weight decay 0", edits=(Edit(where),))
