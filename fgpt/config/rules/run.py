"""Rules about the run directory, data sets, the plain engine, and `speed`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fgpt.config.batch import BatchRamp
from fgpt.config.deepspeed.settings import (
    CHECKPOINTING,
    GRAD_ACCUM_DTYPE,
    OPTIMIZER_OFFLOAD,
    PARAM_OFFLOAD,
)
from fgpt.config.field_syntax import (
    blend_error,
    parse_stages,
    ramp_error,
    ranges_error,
    stages_error,
)
from fgpt.config.rules import Context, Finding, rule
from fgpt.config.rules.layout import valid_batch
from fgpt.config.schema import Shapes
from fgpt.config.speed import compile_obstacles, compiles_blocks, fused_loss_obstacles
from fgpt.errors import Edit
from fgpt.optim.schedules import RATES
from fgpt.utils.compiler import missing_compiler


@rule("run-dir-name", "name a directory")
def _run_dir_name(ctx: Context) -> Iterator[Finding]:
    """A run needs a directory for itself, with a name: an earlier run there is renamed."""
    run_dir = str(ctx.run("run_dir"))
    if Path(run_dir).name in ("", ".."):
        yield Finding("run.run_dir", repr(run_dir), edits=(Edit("run.run_dir"),))


@rule("blend-text", "write DIR, or DIR:0.7,DIR:0.3")
def _mixture(ctx: Context) -> Iterator[Finding]:
    """data.path is one directory, or several with a positive weight each."""
    error = blend_error(ctx.run("data.path"))
    if error:
        yield Finding("run.data.path", error, edits=(Edit("run.data.path"),))


@rule("data-stages", "write TOKENS=DATA;..., as 8e9=DIR:0.7,DIR:0.3;9e9=DIR")
def _data_stages(ctx: Context) -> Iterator[Finding]:
    """Each entry of data.stages has the tokens of the run after which it begins, ascending, and its
    data in the syntax of data.path.
    """
    text = ctx.run("data.stages")
    if text is not None and (error := stages_error(text)):
        yield Finding("run.data.stages", error, edits=(Edit("run.data.stages"),))


@rule("stage-not-reached", "kept; a longer run reads it", "warning")
def _stage_not_reached(ctx: Context) -> Iterator[Finding]:
    """The run ends before the stage begins."""
    text, ramp, batch = ctx.run("data.stages"), ctx.run("train.batch_ramp"), valid_batch(ctx)
    if text is None or stages_error(text) or batch is None or (ramp and ramp_error(ramp)):
        return
    steps, seq_len = ctx.run("train.steps"), ctx.run("data.seq_len")
    tokens = BatchRamp.of(ramp, batch).samples_before(steps) * seq_len
    for stage in parse_stages(text):
        if stage.tokens >= tokens:
            what = (
                f"{stage.path} from {stage.tokens:,.0f} tokens on, of {tokens:,} in {steps} steps"
            )
            yield Finding("run.data.stages", what, edits=())


@rule("skip-samples", "write FIRST-LAST,..., as 1000-1031,2000-2031")
def _skip_samples(ctx: Context) -> Iterator[Finding]:
    """data.skip_samples has ranges of sample numbers, the first and the last of each."""
    text = ctx.run("data.skip_samples")
    if text is not None and (error := ranges_error(text)):
        yield Finding("run.data.skip_samples", error, edits=(Edit("run.data.skip_samples"),))


@rule("reset-needs-mask", "write data.document_mask true, or leave data.reset_positions out")
def _reset_without_mask(ctx: Context) -> Iterator[Finding]:
    """Without document_mask tokens attend to other documents, whose tokens would have the same
    positions.
    """
    if ctx.run("data.reset_positions") and not ctx.run("data.document_mask"):
        where, edits = "run.data.reset_positions", (Edit("run.data.document_mask", True),)
        yield Finding(where, "true with data.document_mask false", edits=edits)


@rule("reset-needs-positions", "leave data.reset_positions out, or choose another model.position")
def _reset_without_positions(ctx: Context) -> Iterator[Finding]:
    """A model with position none has no positions to reset."""
    if ctx.run("data.reset_positions") and ctx.run("model.position") == "none":
        where = "run.data.reset_positions"
        yield Finding(where, "true with model.position none", edits=(Edit(where),))


_NOT_PLAIN = Edit("run.train.engine")


@rule("plain-world", "start one process with tp, pp and cp 1, or leave train.engine at deepspeed")
def _plain_world(ctx: Context) -> Iterator[Finding]:
    """The plain engine is one process without DeepSpeed; several would train independently."""
    if not ctx.is_plain:
        return
    edits = (_NOT_PLAIN,)
    if ctx.world > 1:
        yield Finding("run.train.engine", f"plain on {ctx.world} processes", edits=edits)
    for axis in ("tp", "pp", "cp"):
        size = ctx.run(f"parallel.{axis}")
        if size > 1:
            what = f"{axis} {size} with train.engine plain"
            yield Finding(f"run.parallel.{axis}", what, edits=edits)


@rule("plain-engine", "leave train.engine at deepspeed, or turn this off")
def _plain_precision(ctx: Context) -> Iterator[Finding]:
    """The plain engine has neither loss scaling nor offload."""
    if not ctx.is_plain:
        return
    if ctx.deepspeed.precision == "fp16":
        what = "true with train.engine plain"
        yield Finding("deepspeed.fp16.enabled", what, edits=(_NOT_PLAIN,))
    for section in (OPTIMIZER_OFFLOAD, PARAM_OFFLOAD):
        device = ctx.ds(f"{section}.device")
        if device != "none":
            where, what = f"deepspeed.{section}.device", f"{device} with train.engine plain"
            yield Finding(where, what, edits=(_NOT_PLAIN,))


@rule("plain-optimizer", "use AdamW with torch's parameters, or leave train.engine at deepspeed")
def _plain_optimizer(ctx: Context) -> Iterator[Finding]:
    """The plain engine has only torch's Adam and AdamW, Muon, and those of packages."""
    optimizer = ctx.deepspeed.optimizer
    if not ctx.is_plain or not optimizer:
        return
    if not (optimizer.is_adam or optimizer.is_handed_over):
        what = f"{optimizer.name} with train.engine plain"
        yield Finding("deepspeed.optimizer.type", what, edits=(_NOT_PLAIN,))
    for name in ("bias_correction", "set_grad_none"):
        if ctx.wrote(f"optimizer.params.{name}"):
            what = "only FusedAdam takes it"
            yield Finding(f"deepspeed.optimizer.params.{name}", what, edits=(_NOT_PLAIN,))


@rule("plain-scheduler", "use another schedule, or leave train.engine at deepspeed")
def _plain_scheduler(ctx: Context) -> Iterator[Finding]:
    """OneCycle also changes Adam's betas; the plain engine changes the learning rate only."""
    schedule = ctx.ds("scheduler.type")
    if ctx.is_plain and schedule is not None and schedule not in RATES:
        what = f"{schedule} with train.engine plain"
        yield Finding("deepspeed.scheduler.type", what, edits=(_NOT_PLAIN,))


DEEPSPEED_VALUES = (GRAD_ACCUM_DTYPE, "communication_data_type", "gradient_predivide_factor")
"""Keys that the plain engine does not read."""
DEEPSPEED_SWITCHES = (
    "tensorboard.enabled",
    "wandb.enabled",
    "csv_monitor.enabled",
    "flops_profiler.enabled",
    "comms_logger.enabled",
    "wall_clock_breakdown",
    "memory_breakdown",
    f"{CHECKPOINTING}.cpu_checkpointing",
    f"{CHECKPOINTING}.synchronize_checkpoint_boundary",
    "prescale_gradients",
    "dump_state",
)
"""Switches that the plain engine does not read."""


@rule("plain-ignores", "dropped", "warning")
def _plain_ignores(ctx: Context) -> Iterator[Finding]:
    """Only DeepSpeed has these monitors, profilers and settings of gradient reduction."""
    if not ctx.is_plain:
        return
    for path in DEEPSPEED_SWITCHES:
        if ctx.ds(path):
            yield Finding(f"deepspeed.{path}", "true with train.engine plain")
    for path in DEEPSPEED_VALUES:
        if ctx.wrote(path):
            yield Finding(f"deepspeed.{path}", f"{ctx.ds(path)} with train.engine plain")


_FP8_MULTIPLE = 16
_DEEPSPEED_RECOMPUTATION = (
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "synchronize_checkpoint_boundary",
)


def _require_valid(ctx: Context) -> None:
    """Raise InvalidValueError where a value that decides about compiling or fusing is invalid."""
    for path in ("speed", "model.dropout", "data.document_mask"):
        ctx.run(path)
    for axis in ("tp", "cp", "pp"):
        ctx.run(f"parallel.{axis}")


@rule("compile-blocks", "write auto")
def _compile_blocks(ctx: Context) -> Iterator[Finding]:
    """Dropout and document masks change every step, and TP, CP and ZeRO-3 run Python inside blocks:
    each forces recompilation or graph breaks. Compiled blocks reuse the buffers that recompute
    cheap keeps.
    """
    _require_valid(ctx)
    if ctx.run("speed.compile") == "blocks":
        for obstacle in compile_obstacles(ctx.run_config, ctx.stage):
            what, edits = f"blocks with {obstacle}", (Edit("run.speed.compile"),)
            yield Finding("run.speed.compile", what, edits=edits)


@rule("compile-needs-compiler", "install what is missing, or write auto")
def _compiler(ctx: Context) -> Iterator[Finding]:
    """On a CPU, torch.compile generates C++ code, which includes Python.h."""
    if ctx.device == "cpu" and ctx.run("speed.compile") == "blocks":
        where, missing = "run.speed.compile", missing_compiler("cpu")
        if missing is not None:
            yield Finding(where, f"blocks on a CPU with {missing}", edits=(Edit(where),))


@rule("cuda-graphs", "leave speed.cuda_graphs out")
def _graphs(ctx: Context) -> Iterator[Finding]:
    """CUDA graphs record and replay the compiled blocks, on a GPU only."""
    _require_valid(ctx)
    if not ctx.run("speed.cuda_graphs"):
        return
    where = "run.speed.cuda_graphs"
    if ctx.device == "cpu":
        yield Finding(where, "true on a CPU", edits=(Edit(where),))
    elif not compiles_blocks(ctx.run_config, ctx.stage, ctx.device):
        yield Finding(where, "true, but the blocks are not compiled", edits=(Edit(where),))


@rule("loss-fused", "write auto")
def _fused(ctx: Context) -> Iterator[Finding]:
    """With tp the ranks communicate between logits and loss, and DeepSpeed's pipeline engine calls
    the two separately. In fp16 the logits' gradients, computed before the loss is scaled, would
    underflow.
    """
    _require_valid(ctx)
    if ctx.run("speed.loss") == "fused":
        for obstacle in fused_loss_obstacles(ctx.run_config, ctx.deepspeed.precision):
            what, edits = f"fused with {obstacle}", (Edit("run.speed.loss"),)
            yield Finding("run.speed.loss", what, edits=edits)


@rule("recompute-cheap", "write activation_checkpointing without them, or speed.recompute all")
def _cheap(ctx: Context) -> Iterator[Finding]:
    """speed.recompute cheap replaces DeepSpeed's recomputation by torch's: it needs the
    activation_checkpointing section, and these keys are read by DeepSpeed only.
    """
    if ctx.run("speed.recompute") != "cheap":
        return
    if not ctx.wrote(CHECKPOINTING):
        where, what = "run.speed.recompute", f"cheap without {CHECKPOINTING}"
        yield Finding(where, what, edits=(Edit(where),))
    for name in _DEEPSPEED_RECOMPUTATION:
        if ctx.ds(f"{CHECKPOINTING}.{name}"):
            yield Finding(f"deepspeed.{CHECKPOINTING}.{name}", "true with speed.recompute cheap")


@rule("fp8", "write speed.matmul auto, or change these")
def _fp8(ctx: Context) -> Iterator[Finding]:
    """fp8 products need bf16 tensors with sizes that are multiples of 16; tensor-parallel layers do
    not support them.
    """
    if ctx.run("speed.matmul") != "fp8":
        return
    where = "run.speed.matmul"
    edits = (Edit(where),)
    if ctx.deepspeed.precision != "bf16":
        yield Finding(where, f"fp8 in {ctx.deepspeed.precision}", edits=edits)
    if ctx.run("parallel.tp") > 1:
        yield Finding(where, f"fp8 with tp {ctx.run('parallel.tp')}", edits=edits)
    model, shapes = ctx.run("model"), Shapes.of(ctx.run("model"))
    sizes = {
        "model.d_model": model.d_model,
        "n_head x d_head": shapes.n_head * shapes.d_head,
        "the width of the q, k, v projection": shapes.d_qkv,
        "model.d_ff": shapes.d_ff,
    }
    for what, size in sizes.items():
        if size % _FP8_MULTIPLE:
            yield Finding(where, f"fp8, and {what} is {size}", edits=edits)
    batch = valid_batch(ctx)
    tokens = _FP8_MULTIPLE if batch is None else batch.micro * ctx.run("data.seq_len") // batch.cp
    if tokens % _FP8_MULTIPLE:
        what = f"fp8, and a rank's micro-batch has {tokens} tokens"
        yield Finding(where, what, edits=edits)
