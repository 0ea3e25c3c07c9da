"""A rank that makes no progress ends the run, named on every rank; a slow one does not."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from typing import Any

import pytest

from fgpt.distributed.launch import World
from fgpt.train.failure_record import read_failures
from tests.ranks import Ranks, run_ranks, start_ranks, start_trainer, wait_until
from tests.tiny import Tiny, train_all
from tests.train.test_stop_signals import under_way

pytestmark = pytest.mark.dist

HOST = socket.gethostname()
GONE_S = 40.0  # about 10 s on an idle machine


def endless(tiny: Tiny, *more: object) -> list[str]:
    return tiny.flags("run", "--steps", 1_000_000, "--set=train.log_every=1", *more)


def train_and_hang(world: World, flags: list[str], rank: int, moment: str) -> None:
    """Train; `rank` hangs in `moment` after four steps, for an hour."""
    from fgpt.cli.train import main
    from fgpt.data.loader import MicroBatches
    from fgpt.model.gpt import Block

    if world.rank == rank:
        at, forward = MicroBatches.at, Block.forward

        def hang_at(self: Any, step: int) -> Any:
            if moment == "data" and step == 4 and self._thread:
                time.sleep(3600)
            if moment == "interpreter lock" and step == 4 and self._thread:
                ctypes.PyDLL(None).sleep(3600)  # no other thread of Python's runs meanwhile
            return at(self, step)

        def hang_forward(block: Any, *args: Any) -> Any:
            if moment == "evaluation" and not block.training:
                time.sleep(3600)
            return forward(block, *args)

        MicroBatches.at, Block.forward = hang_at, hang_forward  # type: ignore[method-assign]
    sys.exit(main(flags))


def said_by(ranks: Ranks, rank: int) -> str:
    """The one line of a rank's own."""
    lines = [line for line in ranks.output(rank).splitlines() if line.startswith("fgpt: ")]
    lines = [line for line in lines if "warning: " not in line]
    assert len(lines) == 1, ranks.output()
    assert "Traceback" not in ranks.output(rank)
    return lines[0]


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_rank(tiny: Tiny, stopped: int) -> None:
    other = 1 - stopped
    with start_trainer(2, *endless(tiny, "--set=train.watchdog_s=5")) as ranks:
        under_way(tiny, ranks)
        os.kill(ranks.pids[stopped], signal.SIGSTOP)
        t0 = time.monotonic()
        codes = ranks.wait(GONE_S)
        assert time.monotonic() - t0 < GONE_S
        assert (codes[stopped], codes[other]) == (-signal.SIGKILL, 1), ranks.output()
        said = said_by(ranks, other)
    who = "rank 0" if stopped == 0 else f"rank 1 on {HOST}"
    assert f": {who} sent no sign of life for " in said
    assert "continue with --resume auto" in said
    stacks = (tiny.path("run") / "stacks" / f"rank_{other:05d}.txt").read_text()
    assert "fgpt/train/loop.py" in stacks
    # and the run continues where it was
    saved = [name for name in tiny.checkpoints("run") if name[-1].isdigit()]
    step = int(saved[-1].removeprefix("step_"))
    flags = [
        tiny.flags("run", "--resume", "auto", "--steps", step + 2),
        tiny.flags("reference", "--steps", step + 2),
    ]
    assert [o.code for o in run_ranks(train_all, 2, flags)[0]] == [0, 0]
    assert tiny.losses("run") == tiny.losses("reference")


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_waits_for_data(tiny: Tiny, rank: int) -> None:
    flags = endless(tiny, "--set=train.watchdog_s=5")
    with start_ranks(train_and_hang, 2, flags, rank, "data", join=False) as ranks:
        assert ranks.wait(GONE_S) == [1, 1], ranks.output()
        for each in range(2):
            said = said_by(ranks, each)
            assert f"rank {rank} on {HOST} stuck in step 5, reading data (at " in said
    record = read_failures(tiny.path("run"))[0]
    assert (record.step, record.exit_code, record.samples) == (4, 1, (16, 17, 18, 19))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_keeps_the_interpreters_lock(tiny: Tiny, rank: int) -> None:
    """Its watchdog stands still too; that of rank 0 is the one that judges, and its store lives."""
    flags = endless(tiny, "--set=train.watchdog_s=5")
    with start_ranks(train_and_hang, 2, flags, rank, "interpreter lock", join=False) as ranks:
        other = 1 - rank
        wait_until(lambda: not ranks.processes[other].is_alive(), GONE_S, "the other rank's end")
        who = "rank 0" if rank == 0 else f"rank 1 on {HOST}"
        assert f"{who} sent no sign of life" in said_by(ranks, other)


@pytest.mark.slow
def test_stacks_that_cannot_be_written(tiny: Tiny) -> None:
    """The run directory's file system hangs, as a pipe does that nobody reads."""
    flags = endless(tiny, "--set=train.watchdog_s=5")
    with start_ranks(train_and_hang, 2, flags, 1, "data", join=False) as ranks:
        under_way(tiny, ranks)
        (tiny.path("run") / "stacks").mkdir()
        os.mkfifo(tiny.path("run") / "stacks" / "rank_00000.txt")
        assert ranks.wait(GONE_S) == [1, 1], ranks.output()
        assert "; no stacks: the run directory does not answer" in said_by(ranks, 0)
        assert "; stacks in " in said_by(ranks, 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_stuck_in_an_evaluation(tiny: Tiny, rank: int) -> None:
    flags = endless(tiny, "--set=train.watchdog_s=3", "--set=eval.every=4")
    with start_ranks(train_and_hang, 2, flags, rank, "evaluation", join=False) as ranks:
        assert ranks.wait(GONE_S) == [1, 1], ranks.output()
        assert f"rank {rank} on {HOST} stuck in evaluation after step 0" in said_by(ranks, 1 - rank)


def train_with_a_slow_step(world: World, flags: list[str], slow_s: float) -> None:
    """Train; the first step takes longer on rank 1."""
    from fgpt.cli.train import main
    from fgpt.engine.deepspeed.zero_engine import ZeroEngine

    train_batch = ZeroEngine.train_batch

    def slow(self: Any, *args: Any) -> Any:
        if world.rank == 1 and self.step == 0:
            time.sleep(slow_s)
        return train_batch(self, *args)

    ZeroEngine.train_batch = slow  # type: ignore[method-assign]
    sys.exit(main(flags))


def test_a_slow_first_step_survives(tiny: Tiny) -> None:
    flags = tiny.flags("run", "--set=train.watchdog_s=5")
    with start_ranks(train_with_a_slow_step, 2, flags, 8.0, join=False) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()


@pytest.mark.slow
def test_a_stopped_run_continues(tiny: Tiny) -> None:
    """Ctrl-Z stops all ranks for longer than the limit; after `fg` they train on.

    A scheduler that suspends a job continues one node after the other.
    """
    with start_trainer(2, *endless(tiny, "--set=train.watchdog_s=5")) as ranks:
        under_way(tiny, ranks)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in ranks.pids:
                os.kill(pid, number)
                time.sleep(2.0 if number == signal.SIGCONT else 0.0)
            time.sleep(10.0 if number == signal.SIGSTOP else 0.0)
        seen = len(tiny.losses("run"))
        wait_until(lambda: len(tiny.losses("run")) > seen + 5, 20, "more steps")
        os.kill(ranks.pids[0], signal.SIGTERM)
        assert ranks.wait() == [143, 143], ranks.output()


@pytest.mark.parametrize("how", ["second signal", "grace"])
def test_a_signal_to_ranks_that_hang(tiny: Tiny, how: str) -> None:
    """Rank 1 hangs in data, rank 0 in a collective: neither reaches the end of the step."""
    flags = endless(tiny, f"--set=train.grace_s={4 if how == 'grace' else 1000}")
    with start_ranks(train_and_hang, 2, flags, 1, "data", join=False) as ranks:
        under_way(tiny, ranks)
        time.sleep(1.0)  # step 5 has begun
        for pid in ranks.pids:
            os.kill(pid, signal.SIGTERM)
        if how == "second signal":
            time.sleep(3.5)
            assert all(process.is_alive() for process in ranks.processes)
            for pid in ranks.pids:
                os.kill(pid, signal.SIGTERM)
        assert ranks.wait(20) == [143, 143], ranks.output()
        expected = {
            "second signal": "ended at once by a second SIGTERM (step 5, reading data, samples 16",
            "grace": "ended at once: SIGTERM, then no progress for ",
        }[how]
        assert f"fgpt: rank 1: {expected}" in ranks.output(1)
