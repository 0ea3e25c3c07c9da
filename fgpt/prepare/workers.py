"""Worker processes, which make the parts.

A worker is a fresh interpreter that imports this module only, not the modules of its parent
(launchers import torch and DeepSpeed). The kernel kills it when its parent dies. Protocol, over a
socket pair:

1. The parent sends a `WorkerConfig`, once.
2. The parent sends a task. The worker replies ("bytes", n) after each batch of text, then
   ("part", part) or an error: ("data error" | "interrupted" | "os error" | "bug", details).
3. The worker exits when the parent closes the connection.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread

import fgpt
from fgpt.errors import DataError
from fgpt.prepare.parts import ShardPart, WorkerConfig, make_part
from fgpt.prepare.sources.corpus import TASK_BYTES, CorpusTask, RetryableError
from fgpt.prepare.verified_encoder import VerifiedEncoder
from fgpt.utils.process import signal_on_parent_death

IN_PROCESS_BYTES = 2**22
# The working directory is removed from sys.path: it may hold a corpus of Python files.
_WORKER_CODE = f"""
import sys
sys.path[:] = filter(None, sys.path)
from {__name__} import worker_main
worker_main(int(sys.argv[1]), int(sys.argv[2]))
"""
# Workers are single-threaded. OpenBLAS would start one thread per core, each of which spins for
# 0.1 s at start.
_WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}


def worker_count(requested: int | None, total_bytes: int | None) -> int:
    """Return the number of workers; 0: work in this process, for text smaller than their start."""
    if requested is not None:
        return requested
    if total_bytes is not None and total_bytes < IN_PROCESS_BYTES:
        return 0
    return len(os.sched_getaffinity(0))


class WorkerPool:
    """Workers started ahead of time: a worker needs 0.2 s to start, and more to load an encoder."""

    def __init__(self, size: int):
        """At most `size` workers; 0: `make_parts` works in this process."""
        self.size = size
        self._idle: list[_Worker] = []
        self._config: WorkerConfig | None = None

    def prestart(self, total_bytes: int | None) -> None:
        """Start the workers that this much text needs."""
        tasks = self.size if total_bytes is None else -(-total_bytes // TASK_BYTES)
        while len(self._idle) < min(self.size, tasks):
            self._idle.append(self._start())

    def configure(self, config: WorkerConfig) -> None:
        """Send `config` to the idle workers; those that have another one are replaced."""
        if self._config == config:
            return
        if self._config is not None:
            self.close()
        self._config = config
        for worker in self._idle:
            worker.configure(config)

    def take(self) -> _Worker:
        """Return a configured worker, which the caller must stop."""
        assert self._config is not None
        return self._idle.pop(0) if self._idle else self._start()

    def _start(self) -> _Worker:
        worker = _Worker()
        if self._config is not None:
            worker.configure(self._config)
        return worker

    def close(self) -> None:
        for worker in self._idle:
            worker.stop()
        self._idle = []


def make_parts(
    config: WorkerConfig,
    tasks: Iterable[CorpusTask],
    pool: WorkerPool,
    progress: Callable[[int], None],
) -> Generator[ShardPart]:
    """Make the part of every task; yields parts as they finish.

    Raises DataError for the corpus, RetryableError for a dead worker, OSError for the disk.
    """
    if pool.size == 0:
        encoder = VerifiedEncoder(config.encoder) if config.encoder else None
        for task in tasks:
            yield make_part(config, encoder, task, progress)
        return
    remaining = iter(tasks)
    busy: dict[Connection, _Worker] = {}
    pool.configure(config)
    try:
        # 1. one task for each worker
        for task in islice(remaining, pool.size):
            worker = pool.take()
            busy[worker.connection] = worker
            worker.submit(task)
        # 2. for each finished part, the next task; without one, the worker stops
        while busy:
            ready = set(wait(list(busy)))
            for worker in [worker for link, worker in busy.items() if link in ready]:
                reply = worker.receive()
                if isinstance(reply, int):
                    progress(reply)
                    continue
                yield reply
                following = next(remaining, None)
                if following is None:
                    busy.pop(worker.connection).stop()
                else:
                    worker.submit(following)
    finally:
        for worker in busy.values():
            worker.stop()


class _Worker:
    """A worker process, seen from the parent."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(fgpt.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER_CODE, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env=os.environ | _WORKER_ENVIRONMENT | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # only the parent handles Ctrl-C
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.task: CorpusTask | None = None
        self._sender = Thread()

    def configure(self, config: WorkerConfig) -> None:
        """Send the config, before any task. Does not block until the worker has started."""

        def send() -> None:
            with contextlib.suppress(OSError):  # the worker died; the first task reports it
                self.connection.send(config)

        self._sender = Thread(target=send, daemon=True)
        self._sender.start()

    def submit(self, task: CorpusTask) -> None:
        self.task = task
        self._sender.join()
        try:
            self.connection.send(task)
        except OSError:
            raise self._death() from None

    def receive(self) -> ShardPart | int:
        """Return a finished part, or the bytes of text processed since the last reply."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if kind == "data error":
            raise DataError(value)
        if kind == "interrupted":
            raise RetryableError(value)
        if kind == "os error":
            raise OSError(*value)
        if kind == "bug":
            raise RuntimeError(f"in a worker process:\n{value}")
        reply: ShardPart | int = value
        return reply

    def _death(self) -> RetryableError:
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = " (out of memory? use fewer --workers)" if code == -signal.SIGKILL else ""
        number = self.task.number if self.task else 0
        return RetryableError(
            f"a worker process ended with {how}{hint} in task {number}; run the same command again:"
            " finished parts are kept"
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._sender.is_alive():
            self._sender.join()
        self.connection.close()


def worker_main(descriptor: int, parent: int) -> None:
    """Run a worker: receive the config, then process tasks until the connection is closed."""
    signal_on_parent_death(signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        return
    connection = Connection(descriptor)
    try:
        config: WorkerConfig = connection.recv()
        encoder = VerifiedEncoder(config.encoder) if config.encoder else None
        gc.freeze()  # exclude the modules and the encoder from garbage collection
        while True:
            connection.send(_run_task(config, encoder, connection.recv(), connection))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _run_task(
    config: WorkerConfig, encoder: VerifiedEncoder | None, task: CorpusTask, connection: Connection
) -> tuple[str, object]:
    def progress(text_bytes: int) -> None:
        connection.send(("bytes", text_bytes))

    try:
        return "part", make_part(config, encoder, task, progress)
    except RetryableError as error:
        return "interrupted", str(error)
    except DataError as error:
        return "data error", str(error)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        return "os error", (error.errno, error.strerror, error.filename)
    except Exception:  # a bug in FGPT: the parent prints the traceback and suggests no rerun
        return "bug", traceback.format_exc()
