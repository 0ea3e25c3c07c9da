"""One rank of a scenario: it builds the target, takes the warmup steps, then runs commands.

    python -m fgpt.bench.worker JOB     `fgpt.bench.job.Job` as JSON; rank 0 reads commands from
                                        stdin and replies on stdout, one JSON object per line
    python -m fgpt.bench.worker FILE    {"job": ..., "commands": [...], "answers": FILE}: for ranks
                                        on other nodes

Everything that libraries print goes to stderr.
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
from fgpt.bench.target import batches_for, build_target, load_libraries
from fgpt.bench.time_breakdown import time_breakdown, trace_steps
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
from fgpt.utils.process import (
    exit_with_parent,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
)

WARMUP_STEPS = 5
"""Their losses are compared with the reference's."""
ROUND_S = 0.3
"""A round is as many batches as fill this time, in seconds."""


def main(argv: Sequence[str]) -> int:
    """Run as a rank; returns the exit code."""
    # deepspeed adds its own --local_rank
    text = next(argument for argument in argv if not argument.startswith("--local_rank"))
    remote = None if text.startswith("{") else json.loads(Path(text).read_text())
    if remote is None:
        job, commands, replies = Job(**json.loads(text)), iter(sys.stdin.readline, ""), None
    else:
        job, replies = Job(**remote["job"]), remote["answers"]
        commands = map(json.dumps, remote["commands"])
    output = _open_replies(replies)
    exit_with_parent(os.environ)
    # DeepSpeed's DeepSpeed calls deprecated torch names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b")
    world = world_from_environment(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", device_kind())
    load_libraries(job)
    device = init_process_group(world, os.environ)
    try:
        with watch_peers(world, device):
            if remote is None:
                _wait_to_begin(world, commands, output, device)
            _serve(Worker(job, world, device), commands, output)
    except FgptError as error:
        print(f"fgpt: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        shutdown()
    return 0


def _open_replies(file: str | None) -> TextIO:
    """Open the file, or a copy of stdout; then redirect stdout to stderr."""
    output = os.fdopen(os.dup(1), "w", buffering=1) if file is None else open(file, "a")
    os.dup2(2, 1)
    return output


def _wait_to_begin(
    world: World, commands: Iterable[str], output: TextIO, device: torch.device
) -> None:
    """Report the start and wait for the first command: the warmup steps of scenarios that are
    measured together must not overlap.
    """
    if world.is_rank0:
        _reply(output, {"started": True})
    if not run_on_rank0(lambda: next(iter(commands), ""), device):
        raise SystemExit(0)  # the parent has closed the pipe


class PeakMemory:
    """Peak memory from construction on: allocated on a GPU; on a CPU the growth of the RSS."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_peak_resident()
            self.baseline_bytes = resident_bytes()

    def read(self) -> dict[str, Any]:
        """The record's `memory`: peak, reserved by torch's allocator, and what the peak counts."""
        if self.device.type == "cuda":
            peak_bytes = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            kind = "allocated on the GPU"
        else:
            peak_bytes, reserved = peak_resident_bytes() - self.baseline_bytes, None
            kind = "resident above the libraries"  # this value is part of the record format
        return {"peak_bytes": peak_bytes, "reserved_bytes": reserved, "what": kind}


class Worker:
    """This rank of a scenario, after its warmup steps."""

    def __init__(self, job: Job, world: World, device: torch.device):
        t0 = time.perf_counter()
        self.world, self.device = world, device
        self.resolved = job.resolved(device.type)
        peak_memory = PeakMemory(device)
        self.target = build_target(job, self.resolved, world, device)
        self.batches = batches_for(self.resolved, world, device)
        self.step = 0
        self.losses = [self._warmup_step() for _ in range(WARMUP_STEPS)]
        self.synchronize()
        self.setup_s = time.perf_counter() - t0
        self.memory = peak_memory.read()
        self._predict_batch()  # warmup of prediction
        self.batches_per_round = {
            "train": self._fill_round(self._train_batch),
            "predict": self._fill_round(self._predict_batch),
        }

    def _warmup_step(self) -> float:
        self.step += 1
        return float(self.target.train_batch(self.batches.at(self.step - 1)).result().loss)

    def _fill_round(self, run_batch: Callable[[], None]) -> int:
        """How many batches fill a round, the same on all ranks."""
        seconds = self._time(run_batch, 1)["round_s"]
        return max_over_ranks(max(1, round(ROUND_S / seconds)), self.device)

    def synchronize(self) -> None:
        """Wait for the device and for all ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Release the loader and the target."""
        self.batches.close()
        self.target.close()

    def warmup_report(self) -> dict[str, Any]:
        """Losses, memory and sizes of the warmup steps; all ranks call this."""
        per_rank = gather_json(self.memory["peak_bytes"], self.device)
        config = self.resolved.to_json()
        del config["origins"], config["issues"]  # they name folders of this machine
        return {
            "losses": self.losses,
            "setup_s": self.setup_s,
            "memory": {**self.memory, "per_rank_bytes": per_rank},
            "threads": torch.get_num_threads(),
            "batches": self.batches_per_round,
            "grid": self.resolved.batch.grid,
            "config": config,
        }

    def train(self) -> dict[str, Any]:
        """Time a round of optimizer steps."""
        return self._time(self._train_batch, self.batches_per_round["train"])

    def predict(self) -> dict[str, Any]:
        """Time a round of forward passes without gradients."""
        return self._time(self._predict_batch, self.batches_per_round["predict"])

    def _time(self, run_batch: Callable[[], None], n: int) -> dict[str, Any]:
        self.synchronize()
        t0 = time.perf_counter()
        for _ in range(n):
            run_batch()
        self.synchronize()
        return {"round_s": time.perf_counter() - t0}

    def _train_batch(self) -> None:
        self.target.train_batch(self.batches.at(self.step))
        self.step += 1

    def _predict_batch(self) -> None:
        self.target.eval_batches(self.batches.at(self.step))
        self.step += 1

    def breakdown(self) -> dict[str, Any]:
        """Where the time of a round of steps goes, and the bytes sent in one step."""
        n_steps = self.batches_per_round["train"]
        return time_breakdown(self._train_batch, n_steps, self.batches, self.target, self.device)

    def trace(self, file: str) -> dict[str, Any]:
        """Profile two steps with torch's profiler; rank 0 writes the trace to `file`."""
        return trace_steps(self._train_batch, 2, file if self.world.is_rank0 else None, self.device)


def _serve(worker: Worker, commands: Iterable[str], output: TextIO) -> None:
    """Run rank 0's commands on every rank until there are no more."""
    methods: dict[str, Callable[..., dict[str, Any]]] = {
        "train": worker.train,
        "predict": worker.predict,
        "breakdown": worker.breakdown,
        "trace": worker.trace,
    }
    warmup = worker.warmup_report()
    if worker.world.is_rank0:
        _reply(output, warmup)
    for command in _commands(worker.device, commands):
        name = command.pop("do")
        reply = {"do": name, **methods[name](**command)}
        if worker.world.is_rank0:
            _reply(output, reply)
    worker.close()


def _commands(device: torch.device, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Broadcast the lines that rank 0 reads."""
    source = iter(lines)
    while line := run_on_rank0(lambda: next(source, ""), device):
        yield json.loads(line)


def _reply(output: TextIO, reply: dict[str, Any]) -> None:
    output.write(json.dumps(reply) + "\n")
    output.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
