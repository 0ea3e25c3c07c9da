"""Worker processes: each takes a task, makes its part, and asks for the next.

A worker is a fresh interpreter that imports this file alone, not the program that started it (a
launcher brings torch and DeepSpeed along), and talks over a socket pair. It ends when its parent
does, however the parent ends.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from fgpt.prepare.parts import Job, Part, make_part
from fgpt.prepare.sources.corpus import TASK_BYTES, Interrupted, Task
from fgpt.prepare.verified_encoder import VerifiedEncoder

IN_PROCESS_BYTES = 2**22
# without the working directory on the path: a corpus of Python sources may lie there
_SERVE = f"""
import sys
sys.path[:] = filter(None, sys.path)
from {__name__} import serve
serve(int(sys.argv[1]), int(sys.argv[2]))
"""
# a worker has one thread; numpy's OpenBLAS starts one for every core, which wait by turning (0.1 s
# of a core at each start)
_THREADS = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}
PR_SET_PDEATHSIG = 1  # prctl(2)


def worker_count(wanted: int | None, total_bytes: int | None) -> int:
    """Processes to use; 0: do the work here, for it is smaller than starting them."""
    if wanted is not None:
        return wanted
    if total_bytes is not None and total_bytes < IN_PROCESS_BYTES:
        return 0
    return len(os.sched_getaffinity(0))


class Crew:
    """Worker processes that may be started before there is a job for them."""

    def __init__(self, count: int):
        """At most `count` workers; 0: whoever makes the parts does it alone."""
        self.count = count
        self._idle: list[_Worker] = []
        self._job: Job | None = None

    def start(self, total_bytes: int | None) -> None:
        """Start those that this much text will need: it takes them some 0.2 s to be ready."""
        tasks = self.count if total_bytes is None else -(-total_bytes // TASK_BYTES)
        while len(self._idle) < min(self.count, tasks):
            self._idle.append(_Worker())
            if self._job is not None:
                self._idle[-1].employ(self._job)

    def tell(self, job: Job) -> None:
        """Have those who are there make ready for this job, and for no other."""
        if self._job not in (None, job):
            self.close()
        if self._job != job:
            for worker in self._idle:
                worker.employ(job)
        self._job = job

    def hire(self) -> _Worker:
        """A worker for the job that was told last. It is the caller's to stop."""
        assert self._job is not None
        if self._idle:
            return self._idle.pop(0)
        worker = _Worker()
        worker.employ(self._job)
        return worker

    def close(self) -> None:
        """End those who were not hired."""
        for worker in self._idle:
            worker.stop()
        self._idle = []


def make_parts(
    job: Job, tasks: Iterable[Task], crew: Crew, progress: Callable[[int], None]
) -> Generator[Part]:
    """Make the part of every task; yields them as they finish.

    Raises DataError for what the corpus or a worker did wrong, OSError for the disk.
    """
    if crew.count == 0:
        encoder = VerifiedEncoder(job.encoder) if job.encoder else None
        for task in tasks:
            yield make_part(job, encoder, task, progress)
        return
    left = iter(tasks)
    busy: dict[Connection, _Worker] = {}
    crew.tell(job)
    try:
        for task in islice(left, crew.count):
            worker = crew.hire()
            busy[worker.connection] = worker
            worker.give(task)
        while busy:
            ready = set(wait(list(busy)))
            for worker in [worker for link, worker in busy.items() if link in ready]:
                answer = worker.answer()
                if isinstance(answer, int):
                    progress(answer)
                    continue
                yield answer
                following = next(left, None)
                if following is None:
                    busy.pop(worker.connection).stop()
                else:
                    worker.give(following)
    finally:
        for worker in busy.values():
            worker.stop()


class _Worker:
    """The parent's end of one worker."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(fgpt.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env=os.environ | _THREADS | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.task: Task | None = None
        self._briefing = Thread()

    def employ(self, job: Job) -> None:
        """Tell it what every task shares; once, and first. Does not wait until it listens."""
        self._briefing = Thread(target=self._brief, args=(job,), daemon=True)
        self._briefing.start()

    def _brief(self, job: Job) -> None:
        with contextlib.suppress(OSError):  # it died: so says the first task
            self.connection.send(job)

    def give(self, task: Task) -> None:
        """Have it make the part of this task."""
        self.task = task
        self._briefing.join()
        try:
            self.connection.send(task)
        except OSError:
            raise self._died() from None

    def answer(self) -> Part | int:
        """A finished part, or bytes of text done since the last answer."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if kind == "data error":
            raise DataError(value)
        if kind == "interrupted":
            raise Interrupted(value)
        if kind == "os error":
            raise OSError(*value)
        if kind == "bug":
            raise RuntimeError(f"in a worker process:\n{value}")
        found: Part | int = value
        return found

    def _died(self) -> Interrupted:
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = " (out of memory? use fewer --workers)" if code == -signal.SIGKILL else ""
        number = self.task.number if self.task else 0
        return Interrupted(
            f"a worker process ended with {how}{hint} in task {number}; run the same command again:"
            " finished parts are kept"
        )

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        if self._briefing.is_alive():
            self._briefing.join()
        self.connection.close()


def serve(handle: int, parent: int) -> None:
    """A worker's life: the job, then tasks, until the parent closes the connection."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        return
    connection = Connection(handle)
    try:
        job: Job = connection.recv()
        encoder = VerifiedEncoder(job.encoder) if job.encoder else None
        gc.freeze()  # what is there stays, and need not be looked through
        while True:
            connection.send(_answer(job, encoder, connection.recv(), connection))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(
    job: Job, encoder: VerifiedEncoder | None, task: Task, connection: Connection
) -> tuple[str, object]:
    def progress(done_bytes: int) -> None:
        connection.send(("bytes", done_bytes))

    try:
        return "part", make_part(job, encoder, task, progress)
    except Interrupted as error:
        return "interrupted", str(error)
    except DataError as error:
        return "data error", str(error)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        return "os error", (error.errno, error.strerror, error.filename)
    except Exception:  # a fault of ours: the parent shows where, and does not advise another run
        return "bug", traceback.format_exc()
