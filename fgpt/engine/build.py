"""From a resolved configuration to an engine: the page to read first.

1. the model: empty, on the meta device, or sharded by ZeRO-3 while it is built
2. tensor parallelism, activation checkpointing, and the run file's `speed`
3. initial weights: a function of seed and parameter name, the same in every layout
4. the engine: plain, or DeepSpeed's from deepspeed.initialize or accelerate
"""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgpt.config.resolve import Resolved
from fgpt.distributed.launch import World, group_timeout
from fgpt.engine.activation_checkpointing import apply_checkpointing
from fgpt.engine.base import DTYPES, Engine
from fgpt.engine.deepspeed.ops import init_communication, load_operator
from fgpt.engine.deepspeed.patches import follow_with_second_optimizer
from fgpt.engine.speed import apply_speed, prefer_fast_attention
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.optim.build import (
    LearningRateFactors,
    make_optimizer,
    matrix_group,
    muon_update,
    parameter_groups,
)
from fgpt.parallel.tensor.local import local_config
from fgpt.parallel.tensor.parallelize import parallelize
from fgpt.parallel.tensor.sharding import (
    fill_parameters,
    full_shapes,
    initial_shards,
    prepare_tensor_parallel_gradients,
)
from fgpt.parallel.topology import (
    Grid,
    Mpu,
    ProcessGroups,
    make_process_groups,
    record_process_groups,
)
from fgpt.utils.process import keep_freed_memory

if TYPE_CHECKING:
    from fgpt.engine.deepspeed.zero_engine import ZeroEngine


def build_engine(
    resolved: Resolved, world: World, device: torch.device, *, accelerate: bool = False
) -> Engine:
    """Build the configured engine with initial weights. All ranks call this.

    `accelerate`: `accelerate launch` started this process, and its Accelerator builds the engine.
    Raises LaunchError if an operator cannot be built or accelerate's process count is wrong.
    """
    run = resolved.run
    if run.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # or torch fills DeepSpeed's buckets, gigabytes in each micro-batch; torch's stubs lack it
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    prefer_fast_attention(device)
    if device.type == "cpu" and run.speed.keep_memory:
        keep_freed_memory(os.environ)
    if run.train.engine == "plain":
        from fgpt.engine.plain import PlainEngine

        model = GPT(run.model)
        initialize(model, run.model, run.train.seed)
        apply_checkpointing(model, resolved.settings.checkpointing, None, run.speed.recompute)
        apply_speed(model, resolved)
        dtype = DTYPES[resolved.precision]
        return PlainEngine(
            model,
            resolved.deepspeed,
            dtype,
            device,
            run.train.seed,
            run.schedule,
            run.train.ema,
        )
    return _build_deepspeed(resolved, world, device, accelerate)


def _build_deepspeed(
    resolved: Resolved, world: World, device: torch.device, accelerate: bool
) -> Engine:
    settings = resolved.engine_settings
    _prepare_machine(resolved, world)
    # imports DeepSpeed, whose logger exists from here on
    from fgpt.engine.deepspeed.zero_engine import EngineDependencies, ZeroEngine

    # 1. hide DeepSpeed's startup warnings, which no user can act on; dump_state needs INFO
    _set_log_level("info" if settings.get("dump_state") else "error", world)
    # 2. DeepSpeed requires this variable and takes its GPU from it
    os.environ["LOCAL_RANK"] = str(device.index if device.type == "cuda" else world.local_rank)
    init_communication(device.type)
    # 3. process groups, model, engine
    prints = settings.get("memory_breakdown") or settings.get("dump_state")
    quiet = nullcontext() if prints else redirect_stdout(io.StringIO())
    table = resolved.settings.optimizer
    assert table is not None  # resolved
    timeout = group_timeout(resolved.run.train.watchdog_s)
    with record_process_groups(timeout) as created_groups, quiet:
        groups = make_process_groups(
            Grid.of(resolved.batch), world.rank, timeout, with_stage=table.is_own
        )
        engine = _initialize(resolved, world, groups, accelerate)
    _set_log_level(settings.log_level, world)
    # 4. FGPT's interface
    engine_class = ZeroEngine
    if groups.grid.pp > 1:
        from fgpt.engine.deepspeed.pipeline_engine import PipeEngine

        engine_class = PipeEngine
    clip = resolved.settings.get("gradient_clipping") if resolved.clips_in_fgpt else None
    dependencies = EngineDependencies(
        world,
        groups,
        created_groups,
        full_shapes(resolved.run.model),
        resolved.run.train.seed,
        clip,
        table.state_names(resolved.settings.optimizer_params),
        tuple(map(Path, settings.nvme_paths.values())),
        resolved.run.train.ema,
    )
    built = engine_class(engine, dependencies)
    _complete_optimizers(resolved, engine, built, groups, device)
    return built


def _prepare_machine(resolved: Resolved, world: World) -> None:
    """Compile the optimizer's operator, and make room on NVMe. Raises LaunchError."""
    settings = resolved.engine_settings
    report: Callable[[str], None] = lambda line: None  # noqa: E731
    if world.is_rank0:
        report = partial(print, file=sys.stdout, flush=True)  # stdout is redirected meanwhile
    if settings.operator is not None:
        load_operator(settings.operator, report)
    if settings.nvme_paths:
        from fgpt.engine.deepspeed.nvme import (
            buffer_bytes,
            check_buffers,
            nvme_bytes,
            prepare_nvme,
        )

        check_buffers(buffer_bytes(resolved, world.local_size))
        prepare_nvme(nvme_bytes(resolved, share=world.local_size / world.size), report)


def _initialize(resolved: Resolved, world: World, groups: ProcessGroups, accelerate: bool) -> Any:
    """DeepSpeed's engine with this rank's shard of the model."""
    import deepspeed

    # 1. the model and its parameter groups
    engine_json = copy.deepcopy(resolved.engine_json)  # DeepSpeed and accelerate write into it
    model = _build_model(resolved, engine_json, groups)
    names = {parameter: name for name, parameter in _logical_parameters(model).items()}
    # in the order of the module: checkpoints of version 1 depend on it
    named = ((names[parameter], parameter) for parameter in model.parameters())
    section = resolved.deepspeed["optimizer"]
    parameters = parameter_groups(named, matrix_group(section, resolved.run.model))
    # 2. what DeepSpeed does not build itself
    table = resolved.settings.optimizer
    assert table is not None  # resolved
    optimizer = make_optimizer(section, parameters) if table.is_handed_over else None
    scheduler = None
    if resolved.run.schedule.kind != "deepspeed":
        from fgpt.optim.run_schedule import RunSchedule

        scheduler = partial(RunSchedule, config=resolved.run.schedule)
    # 3. the engine
    if accelerate:
        from fgpt.engine.deepspeed.accelerate import prepare

        first = optimizer or parameters
        return prepare(model, first, engine_json, world, resolved.precision, scheduler)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=parameters,
        lr_scheduler=scheduler,
        config=engine_json,
        mpu=_mpu(groups),
    )
    return engine


def _complete_optimizers(
    resolved: Resolved, engine: Any, built: ZeroEngine, groups: ProcessGroups, device: torch.device
) -> None:
    """Give all of the model the schedule's learning rates, with muP's factors, and Muon whole
    matrices.
    """
    section, model = resolved.deepspeed["optimizer"], resolved.run.model
    matrices = matrix_group(section, model)
    second = follow_with_second_optimizer(engine)
    if matrices is None:
        return
    if not matrices.is_orthogonal:
        for optimizer in (engine.basic_optimizer, *second):
            LearningRateFactors(optimizer)
        return
    from fgpt.engine.deepspeed.muon import share_matrices

    dtype, on_cuda = DTYPES[resolved.precision], device.type == "cuda"
    update = muon_update(section, model, dtype, on_cuda=on_cuda)
    shapes = full_shapes(model)
    share_matrices(engine.optimizer, built.parameters(), shapes, groups, device, update)


def _logical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """This rank's parameters by logical name."""
    if isinstance(model, GPT):
        return dict(model.named_parameters())
    from fgpt.parallel.pipeline.stage import PipelineStage, logical_parameters

    assert isinstance(model, PipelineStage)
    return logical_parameters(model)


def _mpu(groups: ProcessGroups) -> Mpu | None:
    """The model-parallel unit that DeepSpeed needs; a pipeline engine makes its own."""
    grid = groups.grid
    return Mpu(groups) if grid.pp == 1 and (grid.tp > 1 or grid.cp > 1) else None


def _build_model(
    resolved: Resolved, engine_json: dict[str, Any], groups: ProcessGroups
) -> nn.Module:
    """This rank's shard of the model, with initial weights."""
    run, tp = resolved.run, groups.grid.tp
    sharded = resolved.zero_stage == 3
    with _param_init_context(engine_json, groups, sharded):
        gpt = GPT(local_config(run.model, tp))
    parallelize(gpt, run.model, groups, sequence=run.parallel.sequence, unfused=sharded)
    apply_checkpointing(gpt, resolved.settings.checkpointing, groups, run.speed.recompute)
    apply_speed(gpt, resolved)
    model: nn.Module = gpt
    if groups.grid.pp > 1:
        from fgpt.parallel.pipeline.partition import stage_bounds
        from fgpt.parallel.pipeline.stage import PipelineStage

        bounds = stage_bounds(run.model, groups.grid.pp, run.parallel.partition)
        model = PipelineStage(gpt, bounds, groups.grid)
    parameters = _logical_parameters(model)
    initial_value = initial_shards(run.model, run.train.seed, groups.coordinates.tensor, tp)
    if sharded:
        is_source = dist.get_rank(groups.replica) == 0
        _fill_sharded_parameters(parameters, initial_value, is_source)
    else:
        fill_parameters(parameters, initial_value)
    prepare_tensor_parallel_gradients(parameters, groups, run.parallel.sequence)
    return model


def _param_init_context(
    engine_json: dict[str, Any], groups: ProcessGroups, sharded: bool
) -> AbstractContextManager[Any]:
    """The context in which parameters are created.

    A pipeline stage later builds its own from meta tensors; ZeRO-3 shards each as it is created.
    """
    if groups.grid.pp > 1:
        return torch.device("meta")
    if not sharded:
        return nullcontext()
    from deepspeed.runtime.zero import Init

    context: AbstractContextManager[Any] = Init(
        data_parallel_group=groups.replica, config_dict_or_path=engine_json, mpu=_mpu(groups)
    )
    return context


@torch.no_grad()
def _fill_sharded_parameters(
    parameters: Mapping[str, nn.Parameter], value: Callable[[str], Tensor], is_source: bool
) -> None:
    """Set ZeRO-3's initial values, gathering one parameter at a time; the source rank fills it."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, parameter in parameters.items():
        with GatheredParameters([parameter], modifier_rank=0):
            if is_source:
                parameter.copy_(value(name))


def _set_log_level(level: str, world: World) -> None:
    """Set the level of DeepSpeed's logger and its handlers; ranks other than 0 log errors only."""
    log = logging.getLogger("DeepSpeed")
    filters: list[logging.Logger | logging.Handler] = [log, *log.handlers]
    for item in filters:
        item.setLevel(level.upper() if world.is_rank0 else logging.ERROR)
