"""A closed engine destroys its process groups and threads."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fgpt.engine.build import build_engine
from tests.engine.runs import micro_batches, resolved_run, variant
from tests.ranks import run_ranks


def threads_and_groups(world, folder, layouts):
    """Return the number of threads and of process groups after each engine."""
    counts = []
    for settings in layouts:
        config = variant(zero_optimization={"stage": 1})
        resolved = resolved_run(folder / str(world.rank), config, world.size, **settings)
        engine = build_engine(resolved, world, torch.device("cpu"))
        engine.train_batch(micro_batches(resolved, world, 0))
        engine.close()
        del engine
        gc.collect()
        threads = len(list(Path("/proc/self/task").iterdir()))
        counts.append((threads, len(dist.distributed_c10d._world.pg_map)))
    return counts


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_groups_and_threads_do_not_pile_up(tmp_path):
    tensor, pipe = {"parallel__tp": 2}, {"parallel__pp": 2}
    for counts in run_ranks(threads_and_groups, 2, tmp_path, [tensor, pipe] * 3):
        assert counts[2:4] == counts[4:6]
