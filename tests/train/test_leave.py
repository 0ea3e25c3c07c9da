"""An error on one rank ends all at once, even where destroying a process group blocks (NCCL)."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fgpt.distributed.launch import World
from fgpt.errors import DataError, LostRankError, TrainingError
from fgpt.train.failure import reason_of
from fgpt.train.failure_record import cause, read_failures
from tests.ranks import start_ranks
from tests.tiny import Tiny
from tests.train.test_grid_kills import flags_of

LEFT_S = 20.0  # under 1 s on an idle machine
PHASES = {
    "data": "reading data",
    "forward": "training step",
    "backward": "training step",
    "optimizer": "training step",
    "save": "saving",
    "evaluation": "evaluation",
}


def fail_in(world: World, flags: list[str], rank: int, moment: str) -> None:
    """Train where no process group can be destroyed; `rank` has a bug in `moment`, in step 4."""
    from fgpt.checkpoint import manager
    from fgpt.cli.train import main
    from fgpt.data.loader import MicroBatches
    from fgpt.model.gpt import Block

    def block_for_ever(*args: Any, **kwargs: Any) -> None:
        time.sleep(3600)

    dist.destroy_process_group = block_for_ever
    step = 0
    at, forward, write = MicroBatches.at, Block.forward, manager.write_file
    optimizer_step = torch.optim.AdamW.step

    def fail(where: str) -> None:
        if world.rank == rank and moment == where and step == 3:
            raise ValueError("unforeseen")

    def watched_at(self: Any, number: int) -> Any:
        nonlocal step
        step = max(step, number)  # evaluations read the first samples of their split
        if number == step:
            fail("data")
        return at(self, number)

    def watched_forward(block: Any, *args: Any) -> Any:
        fail("forward" if block.training else "evaluation")
        out = forward(block, *args)
        if out.requires_grad:
            out.register_hook(lambda gradient: fail("backward"))
        return out

    def watched_write(*args: Any, **kwargs: Any) -> Any:
        fail("save")
        return write(*args, **kwargs)

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        fail("optimizer")
        return optimizer_step(*args, **kwargs)

    MicroBatches.at, Block.forward = watched_at, watched_forward  # type: ignore[method-assign]
    manager.write_file, torch.optim.AdamW.step = watched_write, watched_step
    sys.exit(main(flags))


def leaves_at_once(tiny: Tiny, n: int, flags: list[str], rank: int, moment: str) -> None:
    t0 = time.monotonic()
    with start_ranks(fail_in, n, flags, rank, moment, join=False) as ranks:
        codes = ranks.wait(LEFT_S + 30)
        mine = ranks.output(rank)
        others = [ranks.output(other) for other in range(n) if other != rank]
    assert codes == [70 if each == rank else 1 for each in range(n)], "\n".join([mine, *others])
    assert time.monotonic() - t0 < LEFT_S + 30
    assert mine.count("Traceback") == 1 and "ValueError: unforeseen" in mine
    in_step = moment not in ("save", "evaluation")
    where = f"step 4, {PHASES[moment]}, samples " if in_step else f"{PHASES[moment]} after step 4;"
    assert f"this is a bug in FGPT ({where}" in mine
    assert "newest checkpoint: " in mine
    for other in others:
        assert other.count("another rank is gone") == 1 and "Traceback" not in other
    record = cause(read_failures(tiny.path("run")))
    assert record is not None
    assert (record.rank, record.phase, record.exit_code) == (rank, PHASES[moment], 70)
    assert record.error == "ValueError: unforeseen" and record.step == (3 if in_step else 4)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("moment", "rank"),
    [
        pytest.param(
            moment,
            rank,
            marks=() if (i + rank) % 2 == 0 and i in (0, 2, 4, 5) else pytest.mark.slow,
        )
        for i, moment in enumerate(PHASES)
        for rank in range(2)
    ],
)
def test_an_error_on_one_rank(tiny: Tiny, moment: str, rank: int) -> None:
    flags = tiny.flags("run", "--set=eval.every=2", "--set=checkpoint.async=false")
    leaves_at_once(tiny, 2, flags, rank, moment)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("moment", PHASES)
def test_an_error_on_one_rank_of_a_grid(tiny: Tiny, moment: str, rank: int) -> None:
    leaves_at_once(tiny, 4, flags_of(tiny, "--set=checkpoint.async=false"), rank, moment)


NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error (run with NCCL_DEBUG=INFO for"
    " details), NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external"
    " library call failed or device error.\nLast error:\n{}"
)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("a.bin: short"), 2, "a.bin: short"),
        (TrainingError("no disk"), 1, "no disk"),
        (LostRankError("gone"), 1, "gone"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), 1, "CUDA out of memory. -> make"),
        (
            dist.DistBackendError(
                NCCL.format(
                    "Error while creating shared memory segment /dev/shm/nccl-x (size 9637)"
                )
            ),
            1,
            "Error while creating shared memory segment /dev/shm/nccl-x (size 9637) -> give",
        ),
        (
            dist.DistBackendError(
                NCCL.format("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000")
            ),
            1,
            "-> start at most one process per GPU",
        ),
        (
            dist.DistBackendError(NCCL.format("Call to bind failed")),
            1,
            "Call to bind failed -> NCCL_",
        ),
        (
            dist.DistBackendError(
                "NCCL error, NCCL version 2.27.5\nncclRemoteError: A call failed possibly due to a"
                " network error or a remote process exiting prematurely.\nLast error:\n"
                "socketProgress: Connection closed by remote peer a<10.0.0.1<1234>>"
            ),
            1,
            "another rank is gone (ncclRemoteError: socketProgress: Connection closed by remote",
        ),
        (
            RuntimeError("[gloo] Timed out waiting 1800000ms for recv operation to complete"),
            1,
            "another rank is gone or does not answer (Timed out waiting)",
        ),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), 1, "another rank is gone"),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access"),
            1,
            "CUDA error: an illegal",
        ),
        (ValueError("unforeseen"), 70, "this is a bug in FGPT"),
    ],
)
def test_what_is_said_of_an_error(error: Exception, code: int, said: str) -> None:
    reason = reason_of(error)
    assert reason.exit_code == code and said in reason.text
    assert reason.traceback == (said.startswith("CUDA error") or code == 70)
