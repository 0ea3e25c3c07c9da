"""Builds the DeepSpeed engine with accelerate's Accelerator, from the same checked JSON.

On a CPU accelerate 1.15 by default takes each process for the only one, and the ranks would train
independently. FGPT therefore passes the backend and compares accelerate's number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fgpt.config.batch import Batch
from fgpt.config.deepspeed.formats import read_deepspeed
from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.distributed.launch import World
from fgpt.errors import ConfigError, ConfigIssue, LaunchError
from fgpt.optim.optimizers import peak_rate


def check_same_json(environ: Mapping[str, str], ds_config: Path) -> None:
    """Raise ConfigError unless accelerate's deepspeed_config_file equals --ds_config."""
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is None:
        return
    try:
        same = read_deepspeed(Path(file)) == read_deepspeed(ds_config)
    except ConfigError:
        same = False
    if not same:
        raise ConfigError(
            [
                ConfigIssue(
                    where="accelerate's deepspeed_config_file",
                    what=f"{file} differs from --ds_config {ds_config}",
                    fix="name the same DeepSpeed JSON in both",
                )
            ]
        )


def check_data_parallel(batch: Batch) -> None:
    """Raise LaunchError unless all ranks are data parallel; accelerate supports no others."""
    if batch.dp != batch.world:
        raise LaunchError(
            f"accelerate launch supports data-parallel ranks only, and this run has {batch.grid}:"
            " start it with deepspeed or torchrun, or leave tp, pp and cp at 1"
        )


def plugin_class() -> type[Any]:
    """Return accelerate's DeepSpeedPlugin without its link to transformers.

    Upstream registers the JSON for transformers' ZeRO-3 initialization, and raises
    PackageNotFoundError if transformers is not installed, though nothing here uses it.
    """
    from accelerate import DeepSpeedPlugin

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Do nothing."""

    return Plugin


def prepare(
    model: nn.Module,
    optimized: torch.optim.Optimizer | list[dict[str, Any]],
    config: dict[str, Any],
    world: World,
    precision: str,
    make_scheduler: Callable[[Any], Any] | None = None,
) -> Any:
    """Return the DeepSpeed engine of `Accelerator.prepare`.

    `optimized`: parameter groups for the JSON's optimizer, or an optimizer where it has none.
    `make_scheduler`: makes the scheduler of an optimizer; None: that of the JSON, if it has one.
    Raises LaunchError if accelerate has another precision or another number of processes.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import DummyOptim, DummyScheduler

    # accelerate would write its precision into a JSON that has no bf16 or fp16 section
    mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision not in ("no", precision):
        raise LaunchError(
            f"accelerate's mixed_precision is {mixed_precision}, the DeepSpeed JSON's {precision}:"
            " leave mixed_precision out; the JSON's bf16 and fp16 sections set it"
        )
    # lists further settings for accelerate to fill in; the checked JSON has all of them
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    accelerator = Accelerator(
        deepspeed_plugin=plugin_class()(hf_ds_config=config, zero3_init_flag=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend=dist.get_backend())],
    )
    if accelerator.num_processes != world.size:
        raise LaunchError(
            f"accelerate counts {accelerator.num_processes} processes, but {world.size} run and"
            " would train independently: start them with deepspeed or torchrun"
        )
    if isinstance(optimized, torch.optim.Optimizer):
        optimizer = optimized
    else:
        params = DeepSpeedSettings(config).optimizer_params
        optimizer = DummyOptim(
            optimized, lr=peak_rate(params), weight_decay=params.get("weight_decay", 0.0)
        )
    objects: list[Any] = [model, optimizer]
    if "scheduler" in config:
        objects.append(DummyScheduler(optimizer))
    engine, *_ = accelerator.prepare(*objects)
    if make_scheduler is not None:  # accelerate would pass it on for the JSON's optimizers only
        engine.lr_scheduler = make_scheduler(engine.optimizer)
    return engine
