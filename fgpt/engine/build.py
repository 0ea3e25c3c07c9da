"""From a resolved configuration to an engine: the page to read first.

model, empty          with ZeRO-3 each tensor is sharded as soon as it exists
initial values        the same for every layout: f(seed, name)
recomputation         if the JSON has an activation_checkpointing block
speed                 what the run file says: compiled blocks, head and loss in one, oneDNN
engine                plain | DeepSpeed, made by deepspeed.initialize or by accelerate
"""

from __future__ import annotations

import copy
import io
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgpt.config.batch import GLOBAL, Batch
from fgpt.config.resolve import Resolved
from fgpt.distributed.launch import GROUP_TIMEOUT, World
from fgpt.engine.activation_checkpointing import apply_checkpointing
from fgpt.engine.base import Engine
from fgpt.engine.deepspeed.ops import init_communication, load_operators, operators_of
from fgpt.engine.precision import DTYPES
from fgpt.engine.speed import apply_speed, prefer_fast_attention
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.optim.build import parameter_groups
from fgpt.parallel.pipeline.partition import is_pipe_partitioned, stage_bounds
from fgpt.parallel.tensor.parallelize import parallelize
from fgpt.parallel.tensor.sharding import (
    fill_parameters,
    full_shapes,
    initial_shards,
    local_config,
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


def build_engine(
    resolved: Resolved, world: World, device: torch.device, *, accelerate: bool = False
) -> Engine:
    """The engine that the configuration asks for, with initial weights. All ranks call this.

    `accelerate`: this process was started by `accelerate launch`; its Accelerator makes the engine.
    Raises LaunchError if an operator cannot be built or accelerate counts other processes.
    """
    run = resolved.run
    if run.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    prefer_fast_attention(device)
    if device.type == "cpu" and run.speed.keep_memory:
        keep_freed_memory(os.environ)
    if run.train.engine == "plain":
        from fgpt.engine.plain import PlainEngine

        model = GPT(run.model)
        initialize(model, run.model, run.train.seed)
        apply_checkpointing(model, resolved.deepspeed, None, run.speed.recompute)
        apply_speed(model, resolved)
        dtype = DTYPES[resolved.precision]
        return PlainEngine(model, resolved.deepspeed, dtype, device, run.train.seed)
    return _build_deepspeed(resolved, world, device, accelerate)


def _build_deepspeed(
    resolved: Resolved, world: World, device: torch.device, accelerate: bool
) -> Engine:
    config = copy.deepcopy(dict(resolved.deepspeed))
    load_operators(operators_of(config))
    import deepspeed

    from fgpt.engine.deepspeed.zero_engine import EngineDependencies, ZeroEngine

    # its warnings while it starts are about itself; dump_state is said then too
    _set_log_level(logging.INFO if config.get("dump_state") else logging.ERROR, world)
    # DeepSpeed reads its GPU from here, and asserts that it is there
    os.environ["LOCAL_RANK"] = str(device.index if device.type == "cuda" else world.local_rank)
    init_communication(device.type)
    # fp32 without ZeRO: FGPT clips, because DeepSpeed says nothing of the norm (see OptimizerStep)
    own_clip = resolved.precision == "fp32" and resolved.zero_stage == 0
    clip = config["gradient_clipping"] if own_clip else None
    if own_clip:
        config["gradient_clipping"] = 0.0  # absent would mean 1.0
    config[GLOBAL] *= resolved.batch.cp  # to DeepSpeed a part of a sample is a sample
    if config.get("steps_per_print") is None:  # nobody would see what it waits for twice a step
        config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    _drop_redundant_accumulation(config, resolved.batch)
    # DeepSpeed's default is to send parts and to put them together, whatever they are
    parts = is_pipe_partitioned(resolved)
    config["pipeline"] = {"pipe_partitioned": parts, "grad_partitioned": parts}
    with record_process_groups(GROUP_TIMEOUT) as made, _quiet_stdout(config):
        groups = make_process_groups(Grid.of(resolved.batch), world.rank, GROUP_TIMEOUT)
        model = _model(resolved, config, groups)
        parameters = parameter_groups(model)
        if accelerate:
            from fgpt.engine.deepspeed.accelerate import prepare

            engine = prepare(model, parameters, config, world, resolved.precision)
        else:
            engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=parameters,
                config=config,
                mpu=Mpu(groups) if _has_mpu(groups.grid) else None,
            )
    _set_log_level(_log_level(config), world)
    engine_class = ZeroEngine
    if groups.grid.pp > 1:
        from fgpt.engine.deepspeed.pipeline_engine import PipeEngine

        engine_class = PipeEngine
    shapes = full_shapes(resolved.run.model)
    return engine_class(
        engine, EngineDependencies(world, groups, made, shapes, resolved.run.train.seed, clip)
    )


def _drop_redundant_accumulation(config: dict[str, Any], batch: Batch) -> None:
    """Where there is one gradient for each parameter, no float32 sums are needed. Where one rank
    has all gradients, ZeRO-2 shards none: as ZeRO-1 it need not copy them into buckets (in bf16
    with float32 sums that would be another optimizer of DeepSpeed's, which waits for the device).
    """
    if not batch.adds_gradients:
        config.get("data_types", {}).pop("grad_accum_dtype", None)
    zero = config["zero_optimization"]
    sums_apart = "grad_accum_dtype" in config.get("data_types", {})
    if batch.dp * batch.cp == 1 and zero["stage"] == 2 and not sums_apart and not _offloads(zero):
        zero["stage"] = 1


def _offloads(zero: dict[str, Any]) -> bool:
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def _has_mpu(grid: Grid) -> bool:
    return grid.pp == 1 and (grid.tp > 1 or grid.cp > 1)  # a pipeline brings its own


def _model(resolved: Resolved, config: dict[str, Any], groups: ProcessGroups) -> nn.Module:
    """This rank's part of the model, with initial weights."""
    run, tp = resolved.run, groups.grid.tp
    sharded = resolved.zero_stage == 3
    with _param_init_context(config, groups, sharded):
        gpt = GPT(local_config(run.model, tp))
    parallelize(gpt, run.model, groups, sequence=run.parallel.sequence, unfused=sharded)
    apply_checkpointing(gpt, config, groups, run.speed.recompute)
    apply_speed(gpt, resolved)
    model: nn.Module = gpt
    parameters = dict(gpt.named_parameters())
    if groups.grid.pp > 1:
        from fgpt.parallel.pipeline.stage import PipelineStage, logical_parameters

        bounds = stage_bounds(run.model, groups.grid.pp, run.parallel.partition)
        model = stage = PipelineStage(gpt, bounds, groups.grid)
        parameters = logical_parameters(stage)
    value = initial_shards(run.model, run.train.seed, groups.coordinates.tensor, tp)
    if sharded:
        _fill_sharded(parameters, value, leads=dist.get_rank(groups.replica) == 0)
    else:
        fill_parameters(parameters, value)
    prepare_tensor_parallel_gradients(parameters, groups, run.parallel.sequence)
    return model


def _param_init_context(
    config: dict[str, Any], groups: ProcessGroups, sharded: bool
) -> AbstractContextManager[Any]:
    """Where parameters come into being; a pipeline's stage builds its own from meta tensors."""
    if groups.grid.pp > 1:
        return torch.device("meta")
    return _sharded_from_birth(config, groups) if sharded else nullcontext()


def _quiet_stdout(config: dict[str, Any]) -> AbstractContextManager[Any]:
    """What DeepSpeed prints about itself while it starts is said to nobody, unless asked for."""
    asked = config.get("memory_breakdown") or config.get("dump_state")
    return nullcontext() if asked else redirect_stdout(io.StringIO())


def _set_log_level(level: int, world: World) -> None:
    """Of DeepSpeed's logger and of its handler, which filters again; errors only off rank 0."""
    log = logging.getLogger("DeepSpeed")
    parts: list[logging.Logger | logging.Handler] = [log, *log.handlers]
    for part in parts:
        part.setLevel(level if world.is_rank0 else logging.ERROR)


def _log_level(config: dict[str, Any]) -> int:
    """DeepSpeed's: what the JSON says, INFO where the JSON asks for what is said there, WARNING."""
    if config.get("log_level"):
        return int(getattr(logging, config["log_level"].upper()))
    asks = ("wall_clock_breakdown", "memory_breakdown", "steps_per_print")
    asked = any(config.get(name) for name in asks) or config.get("comms_logger", {}).get("enabled")
    return logging.INFO if asked else logging.WARNING


def _sharded_from_birth(
    config: dict[str, Any], groups: ProcessGroups
) -> AbstractContextManager[Any]:
    from deepspeed.runtime.zero import Init

    mpu = Mpu(groups) if _has_mpu(groups.grid) else None
    context: AbstractContextManager[Any] = Init(
        data_parallel_group=groups.replica, config_dict_or_path=config, mpu=mpu
    )
    return context


@torch.no_grad()
def _fill_sharded(
    parameters: Mapping[str, nn.Parameter], value: Callable[[str], Tensor], leads: bool
) -> None:
    """Initial values for ZeRO-3, one whole tensor at a time, drawn by the first rank of a group."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, parameter in parameters.items():
        with GatheredParameters([parameter], modifier_rank=0):
            if leads:
                parameter.copy_(value(name))
