"""Rules about the run file's schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fgpt.config.rules import Context, Finding, rule
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


_FIELDS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "deepspeed": (),
    "wsd": ("warmup_steps", "decay_steps", "decay_shape", "min_ratio", "total_steps"),
    "cosine": ("warmup_steps", "min_ratio", "total_steps"),
    "linear": ("warmup_steps", "min_ratio", "total_steps"),
    "constant": ("warmup_steps", "total_steps"),
}


@rule("schedule-fields", "leave it out, or write schedule.kind wsd, which reads it")
def _schedule_fields(ctx: Context) -> Iterator[Finding]:
    """The schedule of this kind has no such part: with kind deepspeed the JSON's scheduler has its
    own keys, cosine and linear decay from the warm-up on, and constant does not decay.
    """
    kind = ctx.run("schedule.kind")
    for name in _FIELDS_OF_KIND["wsd"]:
        field = f"schedule.{name}"
        is_written = ctx.run(field) is not None and field not in ctx.derived
        if is_written and name not in _FIELDS_OF_KIND[kind]:
            what = f"{shown(ctx.run(field))} with schedule.kind {kind}"
            yield Finding(f"run.{field}", what, edits=(Edit(f"run.{field}"),))


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
    """The run would train its last steps at the end of the schedule's decay, by default at rate
    0.
    """
    if not ctx.run("schedule.decay_steps"):
        return
    total, steps = ctx.run("schedule.total_steps"), ctx.run("train.steps")
    if total < steps:
        where, what = f"{_SCHEDULE}.total_steps", f"{total} is less than train.steps {steps}"
        yield Finding(where, what, edits=(Edit(where),))
