"""A resumed pipeline run equals the uninterrupted one bit for bit."""

from __future__ import annotations

import pytest
import torch

from fgpt.checkpoint.manifest import read_manifest
from fgpt.engine.build import build_engine
from fgpt.parallel.tensor.sharding import full_shapes
from tests.checkpoint.saved import save_engine
from tests.checkpoint.test_resume import (
    DROPOUT,
    FP32_SUMS,
    RECOMPUTE,
    TWICE,
    interrupt_and_resume,
)
from tests.engine.runs import resolved_run, train_steps, variant
from tests.ranks import run_ranks, start_trainer
from tests.tiny import zero

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
MATRIX = {
    "z0-fp32": (zero(0), ()),
    "z1-fp32-dropout-recompute": (zero(1) | TWICE | RECOMPUTE, DROPOUT),
    "z1-bf16": (zero(1) | TWICE | FP32_SUMS, ()),
}


@pytest.mark.parametrize("name", MATRIX)
def test_resumed_on_two_stages(tiny, name):
    changes, flags = MATRIX[name]
    interrupt_and_resume(tiny, 2, "--pp=2", *flags, ds=tiny.ds(**changes))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [zero(0), zero(1) | TWICE | FP32_SUMS], ids=["z0", "z1-bf16"])
def test_resumed_on_two_by_two(tiny, changes):
    interrupt_and_resume(tiny, 4, "--pp=2", ds=tiny.ds(**changes))


def saved_by_stages(world, folder, config):
    """Save after a step."""
    resolved = resolved_run(folder / str(world.rank), config, world.size, parallel__pp=2)
    engine = build_engine(resolved, world, torch.device("cpu"))
    train_steps(resolved, world, engine, 1)
    path = save_engine(engine, world, folder)
    engine.close()
    return path


def test_a_stage_writes_its_layers(tmp_path):
    path = run_ranks(saved_by_stages, 2, tmp_path, variant(**zero(1)))[0]
    manifest = read_manifest(path)
    owners = {name: {saved.file for saved in r.boxes} for name, r in manifest.tensors.items()}
    assert len(owners) == len(full_shapes(resolved_run(tmp_path / "a", variant(), 1).run.model))
    for name, ranks in owners.items():
        first = name.startswith(("embedding.", "blocks.0.", "blocks.1."))
        assert ranks == ({0} if first else {1}), name  # the tied head is the first stage's


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_dies(tiny, stage):
    """The other stage prints one line and exits; the same command resumes."""
    flags = tiny.flags("run", "--pp=2", "--resume=auto", ds=tiny.ds(**zero(1)))
    with start_trainer(2, *flags, env={"FGPT_FAULT": f"forward:{stage}:4:kill"}) as ranks:
        codes = ranks.wait()
        said = ranks.output(1 - stage)
    assert codes[1 - stage] == 1
    assert said.count("another rank is gone") == 1 and "Traceback" not in said, said
    with start_trainer(2, *flags) as again:
        assert again.wait() == [0, 0], again.output()
    assert [step for step, _ in tiny.losses("run")] == [1, 2, 3, 4, 5, 6]
