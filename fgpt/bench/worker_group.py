"""The ranks of one scenario, as processes that `fgpt bench` starts, sends commands to, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fgpt.bench.job import Job
from fgpt.distributed.local_ranks import rank_environments
from fgpt.errors import UserError

WORKER = "fgpt.bench.worker"
START_TIMEOUT_S = 900.0
"""Time limit for building, compiling and the warmup steps, in seconds."""
REPLY_TIMEOUT_S = 600.0
"""Time limit for one reply, in seconds."""
REMOTE_EXIT_S = 30.0
"""Time that a launcher gets to end the ranks on other nodes, in seconds."""


class WorkerGroupFailed(Exception):
    """A rank exited or did not reply in time; the message gives the cause in one line."""


class WorkerGroup:
    """The ranks of a job on this machine. Use as a context manager: leaving it ends all ranks."""

    max_rounds = 1000
    """Rounds that can be requested of it."""

    def __init__(self, job: Job):
        self.job = job
        self.stderr = tempfile.TemporaryFile("w+")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", WORKER, json.dumps(asdict(job))],
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else self.stderr,
                stderr=self.stderr,
                start_new_session=True,  # Ctrl-C reaches only this process, which ends the ranks
                env=environment,
            )
            for rank, environment in enumerate(rank_environments(job.ranks))
        ]
        self.warmup: dict[str, Any] = {}
        """See `Worker.warmup_report`."""

    def wait_until_started(self) -> None:
        """Wait until every rank has imported its libraries. Raises WorkerGroupFailed."""
        self._receive(START_TIMEOUT_S)

    def run_warmup(self) -> None:
        """Build the model and take the warmup steps. Raises WorkerGroupFailed."""
        self._send("begin")
        self.warmup = self._receive(START_TIMEOUT_S)

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run a command on all ranks and return rank 0's reply. Raises WorkerGroupFailed."""
        self._send(json.dumps({"do": command, **arguments}))
        return self._receive(REPLY_TIMEOUT_S)

    def _send(self, line: str) -> None:
        pipe = self.processes[0].stdin
        assert pipe is not None
        try:
            pipe.write(line.encode() + b"\n")
            pipe.flush()
        except OSError as error:
            raise WorkerGroupFailed(self._failure()) from error

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        pipe = self.processes[0].stdout
        assert pipe is not None
        line = b""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerGroupFailed(f"no reply within {timeout_s:.0f} s")
                data = os.read(pipe.fileno(), 1 << 16)
                if not data:
                    raise WorkerGroupFailed(self._failure())
                line += data
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failure(self) -> str:
        """Why the ranks ended, in one line."""
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        self.stderr.seek(0)
        if any(process.returncode == -9 for process in self.processes):
            return "killed: out of memory?"
        return failure_cause(self.stderr.read()) or f"exit code {self.processes[0].returncode}"

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end(grace_s=20 if kind is None else 0)

    def end(self, grace_s: float = 0) -> None:
        """End the ranks; kill those that have not exited after `grace_s` seconds."""
        pipe = self.processes[0].stdin
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()  # the ranks exit at the end of their input
        for process in self.processes:
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self.stderr.close()


class RemoteWorkerGroup(WorkerGroup):
    """The ranks of a job on the nodes of a DeepSpeed hostfile.

    They get all commands at once in a file on the shared file system, and their replies are read
    from another file after they have exited.
    """

    max_rounds = 5

    def __init__(self, job: Job, hostfile: Path, folder: Path):
        """`folder`: for the two files; every node must see it. Raises UserError."""
        first_node, n_nodes, ranks_per_node = _nodes(hostfile, job.ranks)
        self.job = job
        self.warmup = {}
        self.stderr = tempfile.TemporaryFile("w+")
        self.replies: list[dict[str, Any]] = []
        self.replies_file = folder / "answers.jsonl"
        self.replies_file.unlink(missing_ok=True)
        commands = [{"do": "train"}, {"do": "predict"}] * self.max_rounds
        commands += [{"do": "breakdown"}] if job.ranks > 1 else []
        job_file = folder / "job.json"
        job_file.write_text(
            json.dumps(
                {"job": asdict(job), "commands": commands, "answers": str(self.replies_file)}
            )
        )
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_ssh_check"]
        command += ["--hostfile", str(hostfile), "--master_addr", first_node]
        command += ["--num_nodes", str(n_nodes), "--num_gpus", str(ranks_per_node)]
        command += ["--module", WORKER, str(job_file)]
        self.processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self.stderr,
                stderr=self.stderr,
                start_new_session=True,
            )
        ]

    def wait_until_started(self) -> None:
        """Do nothing: the ranks do not wait for a command."""

    def run_warmup(self) -> None:
        """Wait until the ranks have exited. Raises WorkerGroupFailed."""
        timeout_s = START_TIMEOUT_S + REPLY_TIMEOUT_S
        try:
            self.processes[0].wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise WorkerGroupFailed(f"not finished within {timeout_s:.0f} s") from error
        if self.processes[0].returncode or not self.replies_file.exists():
            raise WorkerGroupFailed(self._failure())
        lines = self.replies_file.read_text().splitlines()
        self.warmup, *self.replies = map(json.loads, lines)

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Return the next reply to this command. Raises WorkerGroupFailed if there is none."""
        reply = next((reply for reply in self.replies if reply["do"] == command), None)
        if reply is None:
            raise WorkerGroupFailed(f"{command}: not supported with a hostfile")
        self.replies.remove(reply)
        return reply

    def end(self, grace_s: float = 0) -> None:
        """End the ranks on all nodes.

        DeepSpeed's launcher ends the remote ranks on SIGTERM, but not when it is killed.
        """
        if self.processes[0].poll() is None:
            os.killpg(self.processes[0].pid, signal.SIGTERM)
        super().end(max(grace_s, REMOTE_EXIT_S))


def failure_cause(stderr: str) -> str | None:
    """The cause of a failure in one line, from what the processes wrote; None if they did not."""
    if re.search(r"OutOfMemoryError|out of memory|DefaultCPUAllocator", stderr):
        return "out of memory"
    lines = [line for line in stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else None


def _nodes(hostfile: Path, n_ranks: int) -> tuple[str, int, int]:
    """First node, number of nodes, ranks per node. Raises WorkerGroupFailed if they do not fit."""
    slots = slots_of(hostfile)
    first_node, first_slots = next(iter(slots.items()))
    if n_ranks > sum(slots.values()):
        raise WorkerGroupFailed(f"{n_ranks} ranks, {sum(slots.values())} slots in {hostfile}")
    n_nodes = -(-n_ranks // first_slots)
    if n_ranks % n_nodes:
        raise WorkerGroupFailed(f"{n_ranks} ranks are not divisible by {n_nodes} nodes")
    return first_node, n_nodes, n_ranks // n_nodes


def slots_of(hostfile: Path) -> dict[str, int]:
    """Host -> slots, in the order of DeepSpeed's hostfile. Raises UserError."""
    try:
        text = hostfile.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {hostfile}: cannot be read: {error}") from error
    matches = re.findall(r"^\s*([^#\s]+)\s+slots=(\d+)\s*$", text, re.MULTILINE)
    slots = {host: int(count) for host, count in matches}
    if not slots or min(slots.values()) < 1:
        raise UserError(f"--hostfile {hostfile}: no slots: add a line HOST slots=N per node")
    return slots
