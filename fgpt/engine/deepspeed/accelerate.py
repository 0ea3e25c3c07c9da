"""A DeepSpeed engine made by accelerate's Accelerator, from the same checked JSON.

Without help accelerate 1.15 believes on a CPU that each process is alone, and ranks would train
without a word to each other: it is given the backend, and its count is compared with ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from fgpt.config.batch import Batch
from fgpt.distributed.launch import World
from fgpt.errors import ConfigError, Fault, LaunchError


def same_json(environ: Mapping[str, str], ds_config: Path) -> None:
    """Raise ConfigError unless accelerate's file and --ds_config say the same."""
    named = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if named is None:
        return
    try:
        same = json.loads(Path(named).read_text()) == json.loads(ds_config.read_text())
    except (OSError, ValueError):
        same = False
    if not same:
        raise ConfigError(
            [
                Fault(
                    where="accelerate's deepspeed_config_file",
                    what=f"{named} is not what --ds_config {ds_config} says",
                    fix="name the same DeepSpeed JSON in both",
                )
            ]
        )


def refuse_grid(batch: Batch) -> None:
    """Raise LaunchError unless the ranks are data parallel only: accelerate's engine knows no
    other kind.
    """
    if batch.dp != batch.world:
        raise LaunchError(
            f"accelerate launch makes data-parallel ranks only, and here {batch.grid}: start with"
            " deepspeed or torchrun, or leave tp, pp and cp at 1"
        )


def prepare(
    model: nn.Module,
    groups: list[dict[str, Any]],
    config: dict[str, Any],
    world: World,
    precision: str,
) -> Any:
    """The DeepSpeed engine out of `Accelerator.prepare`; optimizer and schedule are the JSON's.

    Raises LaunchError if accelerate was told another precision, or counts other processes.
    """
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.utils import DummyOptim, DummyScheduler

    # accelerate would write its own precision into the JSON, where nothing is said of one
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", precision):
        raise LaunchError(
            f"accelerate's mixed_precision is {told}, the DeepSpeed JSON says {precision}: leave"
            " mixed_precision out; the JSON's bf16 and fp16 blocks say it"
        )
    # the launcher lists here what else it could set; the checked JSON has all of it
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend=dist.get_backend())],
    )
    if accelerator.num_processes != world.size:
        raise LaunchError(
            f"accelerate counts {accelerator.num_processes} processes where {world.size} run:"
            " they would train alone; start with deepspeed or torchrun instead"
        )
    params = config["optimizer"].get("params", {})
    optimizer = DummyOptim(
        groups, lr=params.get("lr", 1e-3), weight_decay=params.get("weight_decay", 0.0)
    )
    parts: list[Any] = [model, optimizer]
    if "scheduler" in config:
        parts.append(DummyScheduler(optimizer))
    engine, *_ = accelerator.prepare(*parts)
    return engine
