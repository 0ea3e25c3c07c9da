"""Evaluation through the pipeline between training steps, with any number and length of samples."""

from __future__ import annotations

import pytest
import torch

from fgpt.data.loader import MicroBatch
from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from tests.engine.runs import SEQ_LEN, micro_batches, resolved_run, train_steps, variant
from tests.ranks import run_ranks

BEFORE = ((4, SEQ_LEN), (1, SEQ_LEN), (3, 16), (0, 0), (2, SEQ_LEN), (4, 32), (6, SEQ_LEN))
"""Micro-batches to evaluate before each step, and tokens of their samples."""


def alternately(world, folder, settings):
    """Return the losses of alternating evaluation and training."""
    resolved = resolved_run(folder / str(world.rank), variant(), world.size, **settings)
    engine = build_engine(resolved, world, torch.device("cpu"))
    held_out = [*micro_batches(resolved, world, 100), *micro_batches(resolved, world, 101)]
    evaluated, trained = [], []
    for n, length in BEFORE:
        if n:
            batches = [
                MicroBatch(batch.inputs[:, :length], batch.targets[:, :length])
                for batch in held_out[:n]
            ]
            evaluated.append(float(engine.eval_batches(batches)))
        trained += train_steps(resolved, world, engine, 1)["loss"]
    engine.close()
    return evaluated, trained


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_training_and_evaluation_in_turn(tmp_path):
    dropout = {"model__dropout": 0.1}  # training drops, evaluation does not
    plain = {"train__engine": "plain", **dropout}
    evaluated, trained = alternately(World(), tmp_path / "plain", plain)
    found = run_ranks(alternately, 2, tmp_path / "ranks", {"parallel__pp": 2, **dropout})
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(evaluated, rel=1e-5)
    assert found[0][1] == pytest.approx(trained, rel=1e-5)
