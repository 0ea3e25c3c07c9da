"""Run functions and the trainer on several gloo ranks; no process outlives a test.

    run_ranks(function, 2, *args)    -> [function(world, *args) of rank 0, of rank 1]; a rank that
                                        fails or hangs fails the test and shows every rank's output
    start_ranks(...)                 -> Ranks: the same, for signals and kills
    start_trainer(2, *flags)         -> Ranks, each running `launchers/train.py FLAGS`; no launcher

Under a real launcher: `launched.py`.

Ranks are forked from a server that has already imported torch and DeepSpeed, so starting them takes
milliseconds. `function` must be at the top level of a module; its result must pickle.
Pass variables for the ranks as `env`: os.environ of a test does not reach them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 90.0
GONE_S: list[float] = []
"""Of this test so far: seconds from the first end of a process to that of the last one, for each
launch that failed or was ended (`make test-faults` prints the longest)."""


def held_port() -> socket.socket:
    """Reserve a free port until the socket is closed; processes given its number may listen."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
    held.bind(("127.0.0.1", 0))
    return held


def free_port() -> int:
    """Return a free port."""
    with held_port() as held:
        return int(held.getsockname()[1])


def scratch(owner: object) -> Path:
    """Return a new directory that is removed with `owner`."""
    folder = Path(tempfile.mkdtemp(prefix="fgpt-test-"))
    weakref.finalize(owner, shutil.rmtree, folder, True)
    return folder


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll until `condition()` is true and return its value. Fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return value


def run_ranks(
    function: Callable[..., Any],
    n: int,
    *args: Any,
    timeout_s: float = TIMEOUT_S,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run `function(world, *args)` on n ranks of one gloo group; return results in rank order."""
    ranks = start_ranks(function, n, *args, env=env)
    codes = ranks.wait(timeout_s)
    assert codes == [0] * n, f"exit codes {codes}\n{ranks.output()}"
    return ranks.results()


def start_ranks(
    function: Callable[..., Any],
    n: int,
    *args: Any,
    env: Mapping[str, str] | None = None,
    join: bool = True,
) -> Ranks:
    """Start `function(world, *args)` on n ranks; with `join=False` it creates the process group."""
    return Ranks(function, n, args, env or {}, join)


def start_trainer(n: int, *flags: object, env: Mapping[str, str] | None = None) -> Ranks:
    """Start n ranks of `launchers/train.py FLAGS`."""
    return start_ranks(_train, n, [str(flag) for flag in flags], env=env, join=False)


class Ranks:
    """Processes started together; a context manager that kills them at its end."""

    def __init__(
        self,
        function: Callable[..., Any],
        n: int,
        args: Sequence[Any],
        env: Mapping[str, str],
        join: bool,
    ):
        self.folder = scratch(self)
        self.port = held_port()
        port = str(self.port.getsockname()[1])
        shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": port, **env}
        self.processes = []
        server = _server()
        for rank in range(n):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            call = (function, args, {**place, **shared}, self.folder / str(rank), join)
            process = server.Process(target=_rank, args=call)
            process.start()
            self.processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Return the process ids in rank order."""
        return [int(process.pid or 0) for process in self.processes]

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[int]:
        """Return exit codes in rank order, -N for signal N. Timeout: kill all, fail."""
        deadline = time.monotonic() + timeout_s
        running = {process.sentinel: process for process in self.processes}
        ends_s: list[float] = []
        while running and (
            ended := multiprocessing.connection.wait(
                [*running], max(0.0, deadline - time.monotonic())
            )
        ):
            for sentinel in ended:
                running.pop(int(sentinel)).join()  # type: ignore[call-overload]
            ends_s.append(time.monotonic())
        late = [rank for rank, p in enumerate(self.processes) if p.sentinel in running]
        self.kill()
        assert not late, f"ranks {late} still ran after {timeout_s} s\n{self.output()}"
        codes = [int(process.exitcode or 0) for process in self.processes]
        if any(codes):
            GONE_S.append(ends_s[-1] - ends_s[0])
        return codes

    def kill(self) -> None:
        """Send SIGKILL to every rank and its descendants."""
        self.port.close()
        for process in self.processes:
            for pid in _family(int(process.pid or 0)):
                kill(pid)
            process.join()

    def output(self, rank: int | None = None) -> str:
        """Return the output so far of one rank, or of all ranks with headings."""
        if rank is not None:
            file = self.folder / f"{rank}.out"
            return file.read_text() if file.exists() else ""
        return "\n".join(f"--- rank {r}\n{self.output(r)}" for r in range(len(self.processes)))

    def results(self) -> list[Any]:
        """Return the results of the functions."""
        files = [self.folder / f"{rank}.result" for rank in range(len(self.processes))]
        return [pickle.loads(file.read_bytes()) for file in files]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@cache
def _server() -> ForkServerContext:
    """Return the fork server of this test session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with mock.patch.dict(os.environ, own):
        forkserver.ensure_running()
    first = context.Process(target=int)  # includes the imports, which no test's timeout should
    first.start()
    first.join()
    return context


def _rank(
    function: Callable[..., Any],
    args: Sequence[Any],
    env: Mapping[str, str],
    files: Path,
    join: bool,
) -> None:
    """Run one rank's process."""
    os.setsid()
    signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # tests under nohup would inherit that it is ignored
    output = os.open(f"{files}.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    from fgpt.distributed import launch

    world = launch.world_from_environment(os.environ)
    if join:
        launch.init_process_group(world, os.environ)
    result = function(world, *args)
    Path(f"{files}.result").write_bytes(pickle.dumps(result))
    launch.shutdown()


def _train(world: object, flags: list[str]) -> None:
    from fgpt.cli.train import main

    sys.exit(main(flags))


def _family(pid: int) -> list[int]:
    """Return a process and its living descendants, youngest first."""
    try:
        return [p.pid for p in psutil.Process(pid).children(recursive=True)][::-1] + [pid]
    except psutil.NoSuchProcess:
        return []


def kill(pid: int) -> None:
    """Send SIGKILL, if the process exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
