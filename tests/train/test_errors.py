"""One rank's error, all ranks' error, a bug: one message, and its exit code."""

from __future__ import annotations

import signal
import sys

import pytest

from fgpt.distributed.launch import World
from tests.ranks import start_ranks, start_trainer
from tests.tiny import Tiny

pytestmark = pytest.mark.dist


def train_with_an_error(world: World, flags: list[str], rank: int, what: str) -> None:
    """Train; `rank` fails in step 3: a bug, a TrainingError, or its death."""
    from fgpt.cli import train
    from fgpt.data.loader import MicroBatches
    from fgpt.errors import DataError
    from fgpt.train import failure

    at = MicroBatches.at

    def fail(self, step):  # type: ignore[no-untyped-def]
        if world.rank == rank and step == 2 and self._thread:
            if what == "bug":
                raise ValueError("unforeseen")
            if what == "memory":
                import torch

                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
            if what == "own error":
                raise DataError("train.bin: unreadable here")
            signal.raise_signal(signal.SIGSEGV)
        return at(self, step)

    MicroBatches.at = fail  # type: ignore[method-assign]
    failure.RANK0_GRACE_S = 0.5
    sys.exit(train.main(flags))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("bug", 70, "this is a bug in FGPT"),
        (
            "memory",
            1,
            "CUDA out of memory. Tried to allocate 2 GiB. -> make train_micro_batch_size",
        ),
        ("own error", 2, "train.bin: unreadable here"),
        ("crash", -signal.SIGSEGV, ""),
    ],
)
def test_one_ranks_error(tiny: Tiny, what: str, code: int, said: str, rank: int) -> None:
    with start_ranks(train_with_an_error, 2, tiny.flags("run"), rank, what, join=False) as ranks:
        codes = ranks.wait()
        mine, other = ranks.output(rank), ranks.output(1 - rank)
    assert (codes[rank], codes[1 - rank]) == (code, 1), ranks.output()
    if said:
        who = "fgpt: rank 1: " if rank else "fgpt: "
        assert mine.count(f"{who}{said}") == 1
    assert mine.count("Traceback") == (what == "bug")
    assert other.count("after step 2: another rank is gone") == 1 and "Traceback" not in other


def test_everybodys_error_is_said_by_rank_0(tiny: Tiny) -> None:
    with start_trainer(2, *tiny.flags("run", "--resume", "/nowhere")) as ranks:
        ranks.processes[0].join(30)
        assert ranks.processes[0].exitcode == 2
        assert ranks.output(0).count("fgpt: --resume /nowhere: does not exist;") == 1
        assert ranks.wait() == [2, 2]  # where no launcher ends rank 1 after rank 0
        assert ranks.output(1) == ""
