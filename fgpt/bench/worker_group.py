"""The ranks of one scenario, seen from `fgpt bench`: processes that are asked and answer."""

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
from types import TracebackType
from typing import Any

from fgpt.bench.job import Job
from fgpt.distributed.local_ranks import rank_environments
from fgpt.errors import UserError

START_S = 900.0
"""How long the ranks may take to build, compile and take their first steps, in seconds."""
ANSWER_S = 600.0
"""How long one answer may take, in seconds."""

FAR_END_S = 30.0
"""How long a launcher may take to end ranks on other nodes, in seconds."""


class WorkerGroupFailed(Exception):
    """A scenario's ranks ended or did not answer; the message says why in one line."""


class WorkerGroup:
    """The ranks of a job on this machine. Use as a context: all of them end with it."""

    max_rounds = 1000
    """Rounds that they can be asked for."""

    def __init__(self, job: Job):
        self.job = job
        self.errors = tempfile.TemporaryFile("w+")
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "fgpt.bench.ranks.worker", json.dumps(asdict(job))],
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else self.errors,
                stderr=self.errors,
                start_new_session=True,  # Ctrl-C is for this process, which ends them
                env=environment,
            )
            for rank, environment in enumerate(rank_environments(job.ranks))
        ]
        self.first: dict[str, Any] = {}
        """What the ranks said of themselves."""

    def here(self) -> None:
        """Wait until every rank has started. Raises WorkerGroupFailed."""
        self._answer(START_S)

    def ready(self) -> None:
        """Let them build and take the first steps. Raises WorkerGroupFailed."""
        self._tell("begin")
        self.first = self._answer(START_S)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have all ranks do something. Raises WorkerGroupFailed."""
        self._tell(json.dumps({"do": do, **arguments}))
        return self._answer(ANSWER_S)

    def _tell(self, line: str) -> None:
        pipe = self.ranks[0].stdin
        assert pipe is not None
        try:
            pipe.write(line.encode() + b"\n")
            pipe.flush()
        except OSError as error:
            raise WorkerGroupFailed(self._why()) from error

    def _answer(self, patience_s: float) -> dict[str, Any]:
        pipe = self.ranks[0].stdout
        assert pipe is not None
        line = b""
        deadline = time.monotonic() + patience_s
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerGroupFailed(f"no answer within {patience_s:.0f} s")
                part = os.read(pipe.fileno(), 1 << 16)
                if not part:
                    raise WorkerGroupFailed(self._why())
                line += part
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _why(self) -> str:
        """The last words of the ranks, shortened."""
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(5)
        self.errors.seek(0)
        if any(rank.returncode == -9 for rank in self.ranks):
            return "killed: out of memory?"
        return reason(self.errors.read()) or f"exit code {self.ranks[0].returncode}"

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(patience_s=20 if error is None else 0)

    def end(self, patience_s: float = 0) -> None:
        """End the ranks; `patience_s`: how long they may take to leave by themselves."""
        pipe = self.ranks[0].stdin
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()  # no more commands: the ranks leave
        for rank in self.ranks:
            try:
                rank.wait(patience_s)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
            if rank.stdout is not None:
                rank.stdout.close()
        self.errors.close()


class RemoteWorkerGroup(WorkerGroup):
    """The ranks of a job on the nodes of DeepSpeed's hostfile: they are told everything at once,
    through files on the file system that the nodes share, and have answered when they have ended.
    """

    max_rounds = 5

    def __init__(self, job: Job, hostfile: Path, folder: Path):
        """`folder`: on every node, for the files."""
        first, nodes, each = _nodes(hostfile, job.ranks)
        self.job = job
        self.first = {}
        self.errors = tempfile.TemporaryFile("w+")
        self.answers = folder / "answers.jsonl"
        self.answers.unlink(missing_ok=True)
        rounds: list[dict[str, Any]] = [{"do": "train"}, {"do": "predict"}] * self.max_rounds
        commands = [*rounds, *([{"do": "shares"}] if job.ranks > 1 else [])]
        told = {"job": asdict(job), "commands": commands, "answers": str(self.answers)}
        file = folder / "job.json"
        file.write_text(json.dumps(told))
        command = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--no_ssh_check",
            "--hostfile",
            str(hostfile),
        ]
        command += ["--master_addr", first, "--num_nodes", str(nodes), "--num_gpus", str(each)]
        command += ["--module", "fgpt.bench.ranks.worker", str(file)]
        self.ranks = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self.errors,
                stderr=self.errors,
                start_new_session=True,
            )
        ]
        self.coming: list[dict[str, Any]] = []

    def here(self) -> None:
        """They begin by themselves."""

    def ready(self) -> None:
        """Wait until all is done. Raises WorkerGroupFailed."""
        try:
            self.ranks[0].wait(START_S + ANSWER_S)
        except subprocess.TimeoutExpired as error:
            raise WorkerGroupFailed(f"not done within {START_S + ANSWER_S:.0f} s") from error
        if self.ranks[0].returncode or not self.answers.exists():
            raise WorkerGroupFailed(self._why())
        self.first, *self.coming = map(json.loads, self.answers.read_text().splitlines())

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Their next answer to that. Raises WorkerGroupFailed for what they were not told to do."""
        found = next((one for one in self.coming if one["do"] == do), None)
        if found is None:
            raise WorkerGroupFailed(f"{do}: not with a hostfile")
        self.coming.remove(found)
        return found

    def end(self, patience_s: float = 0) -> None:
        """End the ranks, wherever they are.

        DeepSpeed's launcher, told to end, ends its ranks on all nodes; killed, on none.
        """
        if self.ranks[0].poll() is None:
            os.killpg(self.ranks[0].pid, signal.SIGTERM)  # the launcher, and its ranks of this node
        super().end(max(patience_s, FAR_END_S))


def reason(words: str) -> str | None:
    """What went wrong, in one line, by what processes said on standard error."""
    if re.search(r"OutOfMemoryError|out of memory|DefaultCPUAllocator", words):
        return "out of memory"
    lines = [line for line in words.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else None


def _nodes(hostfile: Path, n_ranks: int) -> tuple[str, int, int]:
    """The first node, number of nodes, and ranks on each. Raises WorkerGroupFailed if they are not
    as many on each.
    """
    hosts = slots_of(hostfile)
    first, slots = next(iter(hosts.items()))
    if n_ranks > sum(hosts.values()):
        raise WorkerGroupFailed(f"{n_ranks} ranks, {sum(hosts.values())} slots in {hostfile}")
    nodes = -(-n_ranks // slots)
    if n_ranks % nodes:
        raise WorkerGroupFailed(f"{n_ranks} ranks do not share {nodes} nodes out evenly")
    return first, nodes, n_ranks // nodes


def slots_of(hostfile: Path) -> dict[str, int]:
    """Host -> slots, in the order of DeepSpeed's hostfile. Raises UserError."""
    try:
        text = hostfile.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {hostfile}: cannot be read: {error}") from error
    found = re.findall(r"^\s*([^#\s]+)\s+slots=(\d+)\s*$", text, re.MULTILINE)
    hosts = {host: int(slots) for host, slots in found}
    if not hosts or min(hosts.values()) < 1:
        raise UserError(f"--hostfile {hostfile}: no slots: a line HOST slots=N for each node")
    return hosts
