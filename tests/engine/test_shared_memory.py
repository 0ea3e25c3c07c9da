"""An engine leaves nothing in /dev/shm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from tests.engine.runs import micro_batches, resolved_run, variant
from tests.ranks import run_ranks


def shared_memory_of_this_run(world: World, folder: Path) -> list[str]:
    """Return the names in /dev/shm that contain this run's port, after a step."""
    resolved = resolved_run(folder / str(world.rank), variant(), world.size)
    engine = build_engine(resolved, world, torch.device("cpu"))
    engine.train_batch(micro_batches(resolved, world, 0))
    names = [path.name for path in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")]
    engine.close()
    return names


@pytest.mark.dist
def test_nothing_is_left_in_shared_memory(tmp_path: Path) -> None:
    # `deepspeed` sets this variable if all ranks are on one machine
    assert run_ranks(shared_memory_of_this_run, 2, tmp_path, env={"LOCAL_SIZE": "2"}) == [[], []]
