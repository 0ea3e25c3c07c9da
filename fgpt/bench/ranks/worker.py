"""One rank of one scenario: it builds, takes the first steps, and then does as it is told.

    python -m fgpt.bench.ranks.worker JOB      `fgpt.bench.job.Job` as JSON; rank 0 reads commands
                                               from its standard input and answers on its standard
                                               output, a JSON object a line
    python -m fgpt.bench.ranks.worker FILE     {"job": ..., "commands": [...], "answers": FILE}:
                                               where ranks are far away

Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from fgpt.bench.job import Job
from fgpt.bench.ranks.memory import Memory
from fgpt.bench.ranks.target import batches_for, load_libraries, steps_for
from fgpt.distributed.agreements import gather_json, max_over_ranks, run_on_rank0
from fgpt.distributed.launch import (
    World,
    device_kind,
    init_process_group,
    shutdown,
    world_from_environment,
)
from fgpt.distributed.peers import watch_peers
from fgpt.errors import FgptError
from fgpt.utils.process import exit_with_parent

FIRST_STEPS = 5
"""Steps whose losses are compared with the reference's; they warm up, too."""
ROUND_S = 0.3
"""A round is as many batches as fill this time, in seconds."""


def main(argv: Sequence[str]) -> int:
    """Be a rank; returns the exit code."""
    # deepspeed adds its own --local_rank
    text = next(argument for argument in argv if not argument.startswith("--local_rank"))
    far = None if text.startswith("{") else json.loads(Path(text).read_text())
    job = Job(**(json.loads(text) if far is None else far["job"]))
    commands = iter(sys.stdin.readline, "") if far is None else map(json.dumps, far["commands"])
    replies = _replies(None if far is None else far["answers"])
    exit_with_parent(os.environ)
    # DeepSpeed's calls of torch's older names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    world = world_from_environment(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", device_kind())
    load_libraries(job)
    device = init_process_group(world, os.environ)
    try:
        with watch_peers(world, device):
            if far is None:
                _wait_for_word(world, commands, replies, device)
            _serve(Rank(job, world, device), commands, replies)
    except FgptError as error:
        print(f"fgpt: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        shutdown()
    return 0


def _wait_for_word(
    world: World, lines: Iterable[str], replies: TextIO, device: torch.device
) -> None:
    """Say that this rank is here, and wait to be told to begin: first steps of several scenarios at
    the same time would be in each other's way.
    """
    if world.is_rank0:
        _say(replies, {"here": True})
    if not run_on_rank0(lambda: next(iter(lines), ""), device):
        raise SystemExit(0)  # nobody is there any more


def _replies(file: str | None) -> TextIO:
    """The file, or what was standard output; from now on that is standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1) if file is None else open(file, "a")
    os.dup2(2, 1)
    return replies


class Rank:
    """This rank's part of a scenario."""

    def __init__(self, job: Job, world: World, device: torch.device):
        t0 = time.perf_counter()
        self.world, self.device = world, device
        self.resolved = job.resolved(device.type)
        self.memory = Memory(device)
        self.steps = steps_for(job, self.resolved, world, device)
        self.batches = batches_for(self.resolved, world, device)
        self.step = 0
        self.losses = [self._train() for _ in range(FIRST_STEPS)]
        self.wait()
        self.setup_s = time.perf_counter() - t0
        self.peak = self.memory.peak()
        self._predict()  # its first, as the steps so far were training's
        self.batches_of = {"train": self._fill(self._step), "predict": self._fill(self._predict)}

    def _fill(self, one: Callable[[], None]) -> int:
        """How many batches fill a round, the same on all ranks."""
        seconds = self._timed(one, 1)["round_s"]
        return max_over_ranks(max(1, round(ROUND_S / seconds)), self.device)

    def _train(self) -> float:
        self.step += 1
        return float(self.steps.train_batch(self.batches.at(self.step - 1)).result().loss)

    def wait(self) -> None:
        """Until the device has done what it was told, on every rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Release what is held."""
        self.batches.close()
        self.steps.close()

    def introduce(self) -> dict[str, Any]:
        """What the first steps were like; all ranks call this."""
        per_rank = gather_json(self.peak.peak_bytes, self.device)
        resolved = self.resolved.to_json()
        del resolved["origins"]
        return {
            "losses": self.losses,
            "setup_s": self.setup_s,
            "memory": {**self.peak._asdict(), "per_rank_bytes": per_rank},
            "threads": torch.get_num_threads(),
            "batches": self.batches_of,
            "grid": self.resolved.batch.grid,
            "config": resolved,
        }

    def train(self) -> dict[str, Any]:
        """Time a round of optimizer steps."""
        return self._timed(self._step, self.batches_of["train"])

    def predict(self) -> dict[str, Any]:
        """Time a round of global batches forward, without gradients."""
        return self._timed(self._predict, self.batches_of["predict"])

    def _timed(self, one: Callable[[], Any], n: int) -> dict[str, Any]:
        self.wait()
        t0 = time.perf_counter()
        for _ in range(n):
            one()
        self.wait()
        return {"round_s": time.perf_counter() - t0}

    def _step(self) -> None:
        self.steps.train_batch(self.batches.at(self.step))
        self.step += 1

    def _predict(self) -> None:
        self.steps.eval_batches(self.batches.at(self.step))
        self.step += 1

    def shares(self) -> dict[str, Any]:
        """Where the time of a round of steps goes, and what is sent in one."""
        from fgpt.bench.ranks.shares import shares

        n = self.batches_of["train"]
        return shares(self._step, n, self.batches, self.steps, self.device)

    def trace(self, file: str) -> dict[str, Any]:
        """torch's profiler over two steps; rank 0 writes the trace to `file`."""
        from fgpt.bench.ranks.trace import trace

        return trace(self._step, 2, file if self.world.is_rank0 else None, self.device)


def _serve(rank: Rank, lines: Iterable[str], replies: TextIO) -> None:
    known: dict[str, Callable[..., Any]] = {
        one.__name__: one for one in (rank.train, rank.predict, rank.shares, rank.trace)
    }

    def say(answer: dict[str, Any]) -> None:
        if rank.world.is_rank0:
            _say(replies, answer)

    say(rank.introduce())
    for command in _commands(rank, lines):
        name = command.pop("do")
        say({"do": name, **known[name](**command)})
    rank.close()


def _commands(rank: Rank, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rank 0's commands, on every rank."""
    coming = iter(lines)
    while line := run_on_rank0(lambda: next(coming, ""), rank.device):
        yield json.loads(line)


def _say(replies: TextIO, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
