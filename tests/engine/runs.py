"""Short runs of any engine on a small model, in one process or on ranks, for comparisons."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fgpt.config.resolve import Resolved, RunRequest, resolve
from fgpt.config.run_file import Override
from fgpt.data.loader import MicroBatch
from fgpt.distributed.agreements import mean_over_ranks
from fgpt.distributed.launch import World
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine
from fgpt.parallel.topology import Grid

STEPS = 20
SEQ_LEN = 64
GLOBAL_BATCH = 8
SMALL = {"model__vocab_size": 512, "model__d_model": 64}
"""The tiny preset with a quarter of its width; settings of a test may say otherwise."""
TINY = {"model__vocab_size": 4096, "model__d_model": 256}
"""The preset itself: five times the work."""

BASE: dict[str, Any] = {
    "train_batch_size": GLOBAL_BATCH,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": 1e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "torch_adam": True,
            "fused": True,
        },
    },
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 10, "warmup_type": "linear"},
    },
}


def variant(**changes: Any) -> dict[str, Any]:
    """BASE with some sections replaced."""
    return {**copy.deepcopy(BASE), **changes}


def resolved_run(
    folder: Path, config: dict[str, Any], world_size: int, **settings: Any
) -> Resolved:
    """Resolve a DeepSpeed JSON and run settings (`train__engine="plain"`) as the launcher does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{os.getpid()}.json"
    file.write_text(json.dumps(config))
    settings = {"data__seq_len": SEQ_LEN, "train__steps": STEPS, **SMALL, **settings}
    overrides = tuple(Override(k.replace("__", "."), v, "--set") for k, v in settings.items())
    return resolve(RunRequest(file, None, overrides), world=world_size, device="cpu")


def micro_batches(resolved: Resolved, world: World, step: int) -> list[MicroBatch]:
    """Return this rank's part of a global batch that is the same for every layout.

    Ids are random with falling frequency, so that the loss can fall.
    """
    batch, vocabulary = resolved.batch, resolved.run.model.vocab_size
    data = Grid.of(batch).coordinates(world.rank).data
    generator = torch.Generator().manual_seed(step)
    uniform = torch.rand(batch.global_size, SEQ_LEN + 1, generator=generator)
    ids = (vocabulary * uniform**4).long()
    grid = ids.unflatten(0, (batch.accumulation, batch.dp, batch.micro))
    return [MicroBatch(part[:, :-1], part[:, 1:]) for part in grid[:, data]]


def train_steps(resolved: Resolved, world: World, engine: Engine, steps: int) -> dict[str, Any]:
    """Train `steps` steps; return losses, gradient norms, rates and skips."""
    taken = [engine.train_batch(micro_batches(resolved, world, engine.step)) for _ in range(steps)]
    results = [step.result() for step in taken]
    return {
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
        "rate": [result.learning_rate for result in results],
        "skipped": [result.skipped for result in results],
    }


def full_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Return every full parameter in float32, on every rank."""
    return {name: weight.float().clone() for name, weight in engine.weights()}


Look = Callable[[Any], dict[str, Any]]
"""Returns further results of an engine."""


def whole_run(
    world: World,
    folder: Path,
    config: dict[str, Any],
    settings: dict[str, Any],
    look: Look = lambda engine: {},
) -> dict[str, Any]:
    """Train STEPS steps from the start; return all results, final weights included."""
    resolved = resolved_run(folder / str(world.rank), config, world.size, **settings)
    engine = build_engine(resolved, world, torch.device("cpu"))
    out = train_steps(resolved, world, engine, STEPS)
    loss = engine.eval_batches(micro_batches(resolved, world, 0))
    out["eval"] = float(loss if world.size == 1 else mean_over_ranks(loss))
    out["weights"] = full_weights(engine)
    out |= look(engine)
    engine.close()
    return out


def several_runs(
    world: World,
    folder: Path,
    configs: dict[str, tuple[dict[str, Any], dict[str, Any]]],
    look: Look = lambda engine: {},
) -> dict[str, dict[str, Any]]:
    """Call `whole_run` for each (JSON, settings) in turn, in the same processes."""
    return {name: whole_run(world, folder, *both, look) for name, both in configs.items()}
