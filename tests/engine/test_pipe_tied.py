"""The copies of a tied weight stay equal."""

from __future__ import annotations

import pytest
import torch

from fgpt.engine.build import build_engine
from tests.checkpoint.saved import load_engine, save_engine
from tests.engine.runs import resolved_run, train_steps, variant
from tests.ranks import run_ranks

TABLE = "embedding.token.weight"


def torn(world, folder, saved):
    """Return the copies after a step and after loading, from different copies."""
    resolved = resolved_run(folder / str(world.rank), variant(), world.size, parallel__pp=2)
    engine = build_engine(resolved, world, torch.device("cpu"))
    table = engine.parameters()[TABLE]
    found = []

    def tear_and(act):
        with torch.no_grad():
            table.add_(1e-3 * (world.rank // 2))  # the last stage's
        before = table.detach().clone()
        act()
        found.append((before, table.detach().clone()))

    tear_and(lambda: train_steps(resolved, world, engine, 1))
    path = save_engine(engine, world, saved)
    tear_and(lambda: load_engine(engine, world, path))
    engine.close()
    return found


@pytest.mark.dist
@pytest.mark.timeout(90)
def test_copies_are_made_equal(tmp_path):
    saved = tmp_path / "checkpoints"
    ranks = run_ranks(torn, 4, tmp_path / "ranks", saved)
    for i in range(2):
        first, *others = (rank[i] for rank in ranks)
        assert not any(torch.equal(first[0], before) for before, _ in others[1:])
        assert all(torch.equal(first[1], after) for _, after in others)
