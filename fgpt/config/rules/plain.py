"""Rules about the plain engine: one process, no DeepSpeed, the oracle of the tests."""

from __future__ import annotations

from collections.abc import Iterator

from fgpt.config.rules.context import Context, Finding, Rule


def _plain_world(ctx: Context) -> Iterator[Finding]:
    if ctx.run("train.engine") != "plain":
        return
    if ctx.world > 1:
        yield Finding("run.train.engine", f"plain on {ctx.world} processes")
    for axis in ("tp", "pp", "cp"):
        size = ctx.run(f"parallel.{axis}")
        if size > 1:
            yield Finding(f"run.parallel.{axis}", f"{axis} {size} with train.engine plain")


def _plain_precision(ctx: Context) -> Iterator[Finding]:
    if ctx.run("train.engine") != "plain":
        return
    if ctx.precision == "fp16":
        yield Finding("deepspeed.fp16.enabled", "true with train.engine plain")
    for name in ("offload_optimizer", "offload_param"):
        device = ctx.ds(f"zero_optimization.{name}.device")
        if device != "none":
            what = f"{device} with train.engine plain"
            yield Finding(f"deepspeed.zero_optimization.{name}.device", what)


def _plain_optimizer(ctx: Context) -> Iterator[Finding]:
    optimizer = ctx.optimizer
    if ctx.run("train.engine") != "plain" or not optimizer:
        return
    if not optimizer.adam:
        yield Finding("deepspeed.optimizer.type", f"{optimizer.name} with train.engine plain")
    for name in ("bias_correction", "set_grad_none"):
        if ctx.wrote(f"optimizer.params.{name}"):
            yield Finding(f"deepspeed.optimizer.params.{name}", "FusedAdam's alone")


def _plain_scheduler(ctx: Context) -> Iterator[Finding]:
    plain = ctx.run("train.engine") == "plain"
    if plain and ctx.wrote("scheduler.type") and ctx.ds("scheduler.type") == "OneCycle":
        yield Finding("deepspeed.scheduler.type", "OneCycle with train.engine plain")


PLAIN_CANNOT_HOLD = (
    "data_types.grad_accum_dtype",
    "communication_data_type",
    "gradient_predivide_factor",
)
PLAIN_IGNORES = (
    "tensorboard.enabled",
    "wandb.enabled",
    "csv_monitor.enabled",
    "flops_profiler.enabled",
    "comms_logger.enabled",
    "wall_clock_breakdown",
    "memory_breakdown",
    "activation_checkpointing.cpu_checkpointing",
    "activation_checkpointing.synchronize_checkpoint_boundary",
    "prescale_gradients",
    "dump_state",
)


def _plain_ignores(ctx: Context) -> Iterator[Finding]:
    plain = ctx.run("train.engine") == "plain"
    for path in PLAIN_IGNORES:
        if plain and ctx.ds(path):
            yield Finding(f"deepspeed.{path}", "true with train.engine plain")
    for path in PLAIN_CANNOT_HOLD:
        if plain and ctx.wrote(path):
            yield Finding(f"deepspeed.{path}", f"{ctx.ds(path)} with train.engine plain")


RULES = (
    Rule(
        "plain-world",
        "The plain engine is one process without DeepSpeed; more would be independent trainings.",
        "start one process with tp, pp and cp 1, or leave train.engine at deepspeed",
        _plain_world,
    ),
    Rule(
        "plain-engine",
        "The plain engine has neither loss scaling nor offload.",
        "leave train.engine at deepspeed, or turn this off",
        _plain_precision,
    ),
    Rule(
        "plain-optimizer",
        "The plain engine has torch's Adam and AdamW only.",
        "use AdamW with torch's parameters, or leave train.engine at deepspeed",
        _plain_optimizer,
    ),
    Rule(
        "plain-scheduler",
        "OneCycle moves Adam's betas with the rate; the plain engine moves the rate only.",
        "use another schedule, or leave train.engine at deepspeed",
        _plain_scheduler,
    ),
    Rule(
        "plain-ignores",
        "DeepSpeed's monitors, profilers and ways to sum gradients need DeepSpeed.",
        "turn it off, or leave train.engine at deepspeed",
        _plain_ignores,
    ),
)
