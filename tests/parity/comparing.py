"""Compare layouts with the oracle on test ranks; `change` modifies an engine before training."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fgpt.cli.parity import BUILT_IN
from fgpt.config.resolve import RunRequest
from fgpt.config.run_file import Override
from fgpt.distributed.launch import World
from fgpt.engine.base import Engine
from fgpt.engine.build import build_engine
from fgpt.parity.layouts import ComparedRun, Layout, make_compared_run, parse_layout
from fgpt.parity.trace import BOUNDS, Trace, Verdict, compare, trace

SMALL = {"model.n_layer": 4, "model.d_model": 64, "model.vocab_size": 500, "data.seq_len": 32}
HALF = {"bf16": {"enabled": True}}


def compared_run(
    world: int,
    settings: Mapping[str, Any] | None = None,
    deepspeed: Mapping[str, Any] | None = None,
    steps: int = 6,
) -> ComparedRun:
    """Return a reduced tiny preset with these run-file fields and DeepSpeed sections."""
    config = {**copy.deepcopy(BUILT_IN), **(deepspeed or {})}
    fields = {**SMALL, **(settings or {})}
    overrides = tuple(Override(name, value, "--set") for name, value in fields.items())
    request = RunRequest(Path("test.json"), None, overrides)
    return make_compared_run(config, request, world, "cpu", steps)


def verdicts(
    world: World,
    what: ComparedRun,
    names: Sequence[str],
    change: Callable[[Engine], None] | None = None,
) -> dict[str, Verdict]:
    """For `run_ranks`: return each layout's verdict, valid on rank 0."""
    device, oracle = torch.device("cpu"), Trace()
    if world.is_rank0:
        alone = what.oracle()
        engine = build_engine(alone, World(), device)
        oracle = trace(engine, alone, what.steps)
        assert max(oracle.norms) > alone.deepspeed["gradient_clipping"]  # clipping is active
        assert oracle.losses[-1] < oracle.losses[0]
    found = {}
    for name in names:
        found[name] = _verdict(world, what, parse_layout(name), oracle, change)
    return found


def _verdict(
    world: World, what: ComparedRun, layout: Layout, oracle: Trace, change: Any
) -> Verdict:
    resolved = what.resolved(layout)
    engine = build_engine(resolved, world, torch.device("cpu"))
    if change is not None:
        change(engine)
    bounds = BOUNDS[resolved.precision]
    verdict = compare(engine, resolved, world.rank, what.steps, oracle, bounds)
    engine.close()
    del engine
    gc.collect()
    return verdict
