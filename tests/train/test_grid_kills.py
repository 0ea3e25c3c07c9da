"""kill -9 of any rank of a 2 x 2 grid at any point: the others print one line and exit."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch

from fgpt.distributed.launch import World
from tests.ranks import Ranks, run_ranks, start_ranks, start_trainer, wait_until
from tests.tiny import Tiny, train_all
from tests.train.test_errors import train_with_an_error

pytestmark = pytest.mark.dist

# idle: 0.1 s; 5.1 s where only fgpt/distributed/peers.py notices; the machine may have other
# work
NOTICE_S = 30.0
TIMES = 6
"""A moment comes at its so-many-th time, when training is under way."""


def flags_of(tiny: Tiny, *more: object) -> list[str]:
    """Two stages of two tensor ranks, four micro-batches; evaluation and checkpoint every two
    steps.
    """
    ds = tiny.ds(zero_optimization={"stage": 1}, gradient_accumulation_steps=4)
    return tiny.flags("run", "--tp=2", "--pp=2", "--set=eval.every=2", *more, ds=ds)


def train_until(world: World, flags: list[str], rank: int, moment: str) -> None:
    """Train; `rank` is killed during `moment`."""
    from fgpt.checkpoint.tensor_file import TensorFile
    from fgpt.cli.train import main
    from fgpt.model.gpt import Block

    seen = 0
    forward, new_group, read = Block.forward, torch.distributed.new_group, TensorFile.read

    def die() -> None:
        nonlocal seen
        seen += 1
        if seen == (2 if moment == "load" else TIMES):
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(block: Any, *args: Any) -> Any:
        if (moment == "forward" and block.training) or (
            moment == "evaluation" and not block.training
        ):
            die()
        out = forward(block, *args)
        if moment == "backward" and out.requires_grad:
            out.register_hook(lambda gradient: die())
        return out

    def watched_group(*args: Any, **kwargs: Any) -> Any:
        die()
        return new_group(*args, **kwargs)

    def watched_read(*args: Any, **kwargs: Any) -> Any:
        die()
        return read(*args, **kwargs)

    if world.rank == rank:
        Block.forward = watched  # type: ignore[method-assign]
        if moment == "load":
            TensorFile.read = watched_read  # type: ignore[method-assign]
        if moment == "new group":
            torch.distributed.new_group = watched_group
    os._exit(main(flags))


def others_leave(ranks: Ranks, dead: int) -> str:
    """All exit in time, the others with code 1 and one line each; returns the first line."""
    wait_until(lambda: not ranks.processes[dead].is_alive(), 60, "the planned kill")
    t0 = time.monotonic()
    codes = ranks.wait()
    assert time.monotonic() - t0 < NOTICE_S
    others = [rank for rank in range(4) if rank != dead]
    assert codes[dead] == -signal.SIGKILL and [codes[rank] for rank in others] == [1, 1, 1]
    for rank in others:
        lines = ranks.output(rank).splitlines()
        said = [line for line in lines if line.startswith("fgpt: ") and "warning: " not in line]
        assert len(said) == 1 and "another rank is gone" in said[0], ranks.output()
        assert said[0].startswith("fgpt: rank ") == (rank > 0)
        assert "Traceback" not in ranks.output(rank), ranks.output(rank)
    return said[0]


MOMENTS = ["new group", "forward", "backward", "evaluation"]


@pytest.mark.parametrize(
    ("moment", "rank"),
    [
        pytest.param(moment, rank, marks=() if rank == 3 - i else pytest.mark.slow)
        for i, moment in enumerate(MOMENTS)
        for rank in range(4)
    ],
)
def test_a_rank_dies(tiny: Tiny, moment: str, rank: int) -> None:
    with start_ranks(train_until, 4, flags_of(tiny), rank, moment, join=False) as ranks:
        said = others_leave(ranks, rank)
    if moment == "backward":
        assert "after step " in said and "continue with --resume auto" in said


@pytest.mark.parametrize("rank", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_dies_while_loading(tiny: Tiny, rank: int) -> None:
    assert run_ranks(train_all, 4, [flags_of(tiny, "--steps", 2)])[0][0].code == 0
    flags = flags_of(tiny, "--resume", "auto")
    with start_ranks(train_until, 4, flags, rank, "load", join=False) as ranks:
        others_leave(ranks, rank)
    assert tiny.checkpoints("run") == ["latest", "step_00000002"]


FAULTS = ["data:1:3", "step:2:3", "before_shards:0:4", "after_shards:3:4", "before_manifest:1:4"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_dies_at(tiny: Tiny, fault: str) -> None:
    with start_trainer(4, *flags_of(tiny), env={"FGPT_FAULT": f"{fault}:kill"}) as ranks:
        said = others_leave(ranks, int(fault.split(":")[1]))
    # the step after it may have ended: files are written in the background
    assert "after step " in said and ("step_00000002;" in said or "none;" in said)


@pytest.mark.parametrize(
    ("what", "code", "rank"), [("memory", 1, 1), ("own error", 2, 2), ("bug", 70, 3)]
)
def test_one_ranks_error(tiny: Tiny, what: str, code: int, rank: int) -> None:
    flags = flags_of(tiny)
    with start_ranks(train_with_an_error, 4, flags, rank, what, join=False) as ranks:
        codes = ranks.wait()
    assert codes == [code if r == rank else 1 for r in range(4)], ranks.output()
    assert ranks.output(rank).count(f"fgpt: rank {rank}: ") == 1
    assert ranks.output().count("Traceback") == (what == "bug")
    assert ranks.output().count("another rank is gone") == 3
