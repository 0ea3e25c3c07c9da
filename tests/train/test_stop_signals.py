"""SIGTERM and SIGINT to ranks, in every order: one checkpoint at the current step."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.distributed.launch import World
from fgpt.distributed.progress import Progress
from fgpt.train import stop_signals
from tests.ranks import Ranks, run_ranks, start_ranks, start_trainer, wait_until
from tests.tiny import Tiny, train_all

pytestmark = pytest.mark.dist

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
STOPPED_S = 30.0  # under 2 s on an idle machine


def resumes_exactly(tiny: Tiny, ranks: int = 2, *grid: str, ds: Path | None = None) -> None:
    step = tiny.losses("run")[-1][0]
    assert tiny.checkpoints("run") == ["latest", f"step_{step:08d}"]
    runs = [
        tiny.flags("run", *grid, "--resume", "auto", "--steps", step + 2, ds=ds),
        tiny.flags("reference", *grid, "--steps", step + 2, ds=ds),
    ]
    assert [o.code for o in run_ranks(train_all, ranks, runs)[0]] == [0, 0]
    assert tiny.losses("run") == tiny.losses("reference")


def under_way(tiny: Tiny, ranks: Ranks) -> None:
    metrics = tiny.path("run") / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count('"loss"') > 3, 60, "steps")


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([(1, TERM)], 143),
        ([(0, TERM)], 143),
        ([(0, TERM), (1, TERM)], 143),
        ([(0, TERM), (0, TERM), (1, TERM), (1, TERM)], 143),
        ([(1, INT)], 130),
        ([(0, HUP)], 129),
        ([(0, INT), (1, INT), (0, TERM), (1, TERM)], 143),
    ],
    ids=["one", "leader", "all", "twice", "ctrl-c", "hang-up", "ctrl-c and the launcher's own"],
)
def test_signals(tiny: Tiny, signals: Sequence[tuple[int, int]], code: int) -> None:
    flags = tiny.flags("run", "--steps", 1_000_000, "--set=train.log_every=1")
    with start_trainer(2, *flags, "--set=checkpoint.every=0") as ranks:
        under_way(tiny, ranks)
        for rank, number in signals:
            os.kill(ranks.pids[rank], number)
        assert ranks.wait(STOPPED_S) == [code, code], ranks.output()
        assert ranks.output().count("stopped by a signal after step") == 1
    resumes_exactly(tiny)


@pytest.mark.parametrize(
    ("ranks", "grid", "signalled"),
    [
        (4, ("--tp=2", "--pp=2"), [3]),
        (4, ("--tp=2", "--pp=2"), [0, 1, 2, 3]),
        (2, ("--pp=2",), [0]),
        (2, ("--tp=2", "--sequence"), [1]),
        (2, ("--cp=2",), [1]),
    ],
)
def test_sigterm_to_ranks_of_a_grid(
    tiny: Tiny, ranks: int, grid: Sequence[str], signalled: Sequence[int]
) -> None:
    ds = tiny.ds(zero_optimization={"stage": 1}, gradient_accumulation_steps=2)
    flags = tiny.flags("run", *grid, "--steps", 1_000_000, "--set=train.log_every=1", ds=ds)
    with start_trainer(ranks, *flags, "--set=checkpoint.every=0") as running:
        under_way(tiny, running)
        for rank in signalled:
            os.kill(running.pids[rank], TERM)
        assert running.wait(STOPPED_S) == [143] * ranks, running.output()
        assert running.output().count("stopped by a signal after step") == 1
    resumes_exactly(tiny, ranks, *grid, ds=ds)


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("point", ["before_shards:1", "after_shards:0", "before_rename:0"])
def test_a_signal_during_a_save(tiny: Tiny, point: str, background: str) -> None:
    """A save under way is completed; the step that the run ends at is saved."""
    flags = tiny.flags("run", "--steps", 100, f"--set=checkpoint.async={background}")
    with start_trainer(2, *flags, env={"FGPT_FAULT": f"{point}:4:term"}) as ranks:
        assert ranks.wait() == [143, 143], ranks.output()
    last = tiny.losses("run")[-1][0]
    assert last == 4 if background == "false" else 4 <= last <= 8
    latest, *steps = tiny.checkpoints("run")
    assert latest == "latest" and len(steps) == 2 and steps[-1] == f"step_{last:08d}"


def test_a_signal_before_the_first_step(tiny: Tiny) -> None:
    with start_trainer(2, *tiny.flags("run"), env={"FGPT_FAULT": "data:1:0:term"}) as ranks:
        assert ranks.wait() == [143, 143], ranks.output()
    assert tiny.checkpoints("run") == ["latest", "step_00000001"]


def test_a_signal_at_the_last_step(tiny: Tiny) -> None:
    """The last evaluation may take longer than there is time: it waits for the next start."""
    with start_trainer(2, *tiny.flags("run"), env={"FGPT_FAULT": "step:1:6:term"}) as ranks:
        assert ranks.wait() == [143, 143], ranks.output()
    assert tiny.checkpoints("run")[-1] == "step_00000006"
    flags = [tiny.flags("run", "--resume", "auto"), tiny.flags("all")]
    assert [o.code for o in run_ranks(train_all, 2, flags)[0]] == [0, 0]
    assert (tiny.path("run") / "summary.json").exists()
    assert valid_losses(tiny, "run") == valid_losses(tiny, "all")


def train_with_a_slow_evaluation(world: World, flags: list[str]) -> None:
    """Train; each of the 40 batches of an evaluation after the first one takes a second."""
    from fgpt.cli.train import main
    from fgpt.engine.deepspeed.zero_engine import ZeroEngine

    eval_batches = ZeroEngine.eval_batches

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(1.0 if self.step else 0.0)
        return eval_batches(self, *args)

    ZeroEngine.eval_batches = slow  # type: ignore[method-assign]
    sys.exit(main(flags))


@pytest.mark.slow
def test_a_signal_in_an_evaluation(tiny: Tiny) -> None:
    """It is broken off, the step is saved, and the run makes up for it when it goes on."""
    evaluation = ["--set=eval.every=4", "--set=eval.batches=40", "--set=train.log_every=1"]
    flags = tiny.flags("run", *evaluation, "--set=checkpoint.every=0")
    with start_ranks(train_with_a_slow_evaluation, 2, flags, join=False) as ranks:
        under_way(tiny, ranks)
        time.sleep(2.0)
        os.kill(ranks.pids[1], TERM)
        t0 = time.monotonic()
        assert ranks.wait(STOPPED_S) == [143, 143], ranks.output()
        assert time.monotonic() - t0 < 10
    assert tiny.checkpoints("run") == ["latest", "step_00000004"]
    assert [step for step, _ in valid_losses(tiny, "run")] == [0]
    runs = [tiny.flags("run", *evaluation, "--resume", "auto"), tiny.flags("all", *evaluation)]
    assert [o.code for o in run_ranks(train_all, 2, runs)[0]] == [0, 0]
    assert valid_losses(tiny, "run") == valid_losses(tiny, "all")
    assert [step for step, _ in valid_losses(tiny, "all")] == [0, 4, 6]


def valid_losses(tiny: Tiny, run: str) -> list[tuple[int, float]]:
    lines = (tiny.path(run) / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["valid_loss"]) for r in map(json.loads, lines) if "valid_loss" in r]


def two_sigterms(world: World, launcher_died: bool) -> list[str]:
    """Receive two, far enough apart for a second request; returns why this rank would end."""
    stop_signals.SECOND_SIGNAL_S = 0.2
    ends: list[str] = []
    stop = stop_signals.StopSignals(
        torch.device("cpu"), Progress(), 60.0, lambda text, code: ends.append(f"{text}: {code}")
    )
    if launcher_died:
        os.getppid = lambda: 1
    for _ in range(2):
        os.kill(os.getpid(), TERM)
        time.sleep(0.5)
    stop.close()
    return ends


@pytest.mark.parametrize("launcher_died", [False, True])
def test_a_dead_launchers_signals_are_one_request(launcher_died: bool) -> None:
    """The kernel sends SIGTERM once for each of its threads; they may end seconds apart."""
    ends = [] if launcher_died else ["ended at once by a second SIGTERM: 143"]
    assert run_ranks(two_sigterms, 1, launcher_died) == [ends]
