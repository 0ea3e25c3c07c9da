"""Builds DeepSpeed's C++ operators before they are needed, one process at a time.

Torch's builder uses a lock file, which survives a killed process and then blocks every later start.
FGPT builds in a separate directory under an advisory lock, which the system releases when its
process ends; an operator's lock file found under it is stale. FGPT assumes that nothing else builds
in a TORCH_EXTENSIONS_DIR that the user sets.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

from fgpt.engine.deepspeed.patches import without_shm_collectives
from fgpt.errors import LaunchError
from fgpt.utils.files import file_lock

PROGRESS_EVERY_S = 30.0


def extensions_dir() -> Path:
    """The build directory: TORCH_EXTENSIONS_DIR, else one in this Python environment."""
    directory = Path(sys.prefix) / "fgpt_extensions"
    if not os.access(directory.parent, os.W_OK):
        directory = Path.home() / ".cache" / "fgpt_extensions"
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(directory)))


def load_operator(name: str, report: Callable[[str], None]) -> None:
    """Build or load the operator of a DeepSpeed builder; later loads in this process are free.

    `report` gets a line before a build, and one every PROGRESS_EVERY_S during it. SIGTERM and
    SIGINT end the process and its compilers. Raises LaunchError with the compiler's last line.
    """
    directory = extensions_dir()
    from deepspeed.accelerator import get_accelerator

    with file_lock(directory / "fgpt.lock", wait=True):
        builder = get_accelerator().create_op_builder(name)
        own = directory / builder.name
        (own / "lock").unlink(missing_ok=True)  # a killed process left it
        is_built = any(own.glob("*.so"))
        progress = contextlib.nullcontext() if is_built else _progress(name, own, report)
        try:
            with progress, _ended_by_signals(), contextlib.redirect_stdout(io.StringIO()):
                builder.load(verbose=False)
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise LaunchError(
                f"DeepSpeed's operator {name} could not be built in {directory}: {reason};"
                " install a C++ compiler (g++), ninja and the Python headers"
            ) from error


@contextlib.contextmanager
def _progress(name: str, directory: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Report that an operator is being compiled, as long as the context lasts."""
    operator = name.removesuffix("Builder")
    instead = '"device": "cpu"' if name == "AsyncIOBuilder" else '"torch_adam": true'
    report(
        f"compiling DeepSpeed's {operator} into {directory}, which takes minutes, once; {instead}"
        " needs no compiler"
    )
    start, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(PROGRESS_EVERY_S):
            report(f"  still compiling after {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    report(f"  compiled in {time.monotonic() - start:.0f} s")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End this process and its children on SIGTERM and SIGINT, while no step could notice them."""

    def end(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def init_communication(device_kind: str) -> None:
    """Make DeepSpeed use the existing process group (nccl on "cuda", gloo on "cpu").

    Its shared-memory collectives, which are for inference, stay off: under `deepspeed` on a CPU
    each rank would compile them, leave 66 MiB in /dev/shm, crash where that is full, and wait for a
    dead rank in a loop that no signal interrupts.
    """
    import deepspeed

    with without_shm_collectives():
        deepspeed.init_distributed(dist_backend="nccl" if device_kind == "cuda" else "gloo")
