"""A resumed pipeline run equals the uninterrupted one bit for bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fgpt.engine.build import build_engine
from tests.checkpoint.test_resume import (
    DROPOUT,
    FP32_SUMS,
    RECOMPUTE,
    TWICE,
    interrupt_and_resume,
    zero,
)
from tests.engine.runs import full_weights, resolved_run, train_steps, variant
from tests.ranks import run_ranks, start_trainer

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


def go_on(world, folder, config):
    """Three steps, a checkpoint, three steps; then the checkpoint in a new engine, three steps."""
    resolved = resolved_run(folder / str(world.rank), config, world.size, parallel__pp=2)
    directory = folder / "checkpoint"
    directory.mkdir(exist_ok=True)
    engine = build_engine(resolved, world, torch.device("cpu"))
    train_steps(resolved, world, engine, 3)
    files = [file.name for file in engine.save(directory)]
    whole = (train_steps(resolved, world, engine, 3), full_weights(engine))
    engine.close()
    engine = build_engine(resolved, world, torch.device("cpu"))
    with mock.patch.object(torch, "load", wraps=torch.load) as load:
        engine.load(directory)
    part = (train_steps(resolved, world, engine, 3), full_weights(engine))
    engine.close()
    return {
        "files": files,
        "steps": (whole[0], part[0]),
        "weights": (whole[1], part[1]),
        "read": {str(call.args[0]): call.kwargs["weights_only"] for call in load.call_args_list},
    }


def test_a_stage_writes_its_layers_and_no_code_is_unpickled(tmp_path):
    found = run_ranks(go_on, 2, tmp_path, variant(**zero(1)))
    for rank, run in enumerate(found):
        assert run["steps"][0] == run["steps"][1]
        assert all(
            torch.equal(run["weights"][0][n], run["weights"][1][n]) for n in run["weights"][0]
        )
        layers = range(3) if rank == 0 else range(3, 7)
        assert {name for name in run["files"] if name.startswith("layer_")} == {
            f"layer_{i:02}-model_00-model_states.pt" for i in layers
        }
        assert set(run["read"].values()) == {True}  # weights_only
        assert sum("layer_" in name for name in run["read"]) == len(layers)


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
