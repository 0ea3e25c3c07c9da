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
import sys
from pathlib import Path

from fgpt.engine.deepspeed.patches import without_shm_collectives
from fgpt.errors import LaunchError
from fgpt.utils.files import file_lock


def extensions_dir() -> Path:
    """The build directory: TORCH_EXTENSIONS_DIR, else one in this Python environment."""
    directory = Path(sys.prefix) / "fgpt_extensions"
    if not os.access(directory.parent, os.W_OK):
        directory = Path.home() / ".cache" / "fgpt_extensions"
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(directory)))


def load_operator(name: str) -> None:
    """Build or load the operator of a DeepSpeed builder; later loads in this process are free.

    Raises LaunchError with the compiler's last line.
    """
    directory = extensions_dir()
    from deepspeed.accelerator import get_accelerator

    with file_lock(directory / "fgpt.lock", wait=True):
        builder = get_accelerator().create_op_builder(name)
        (directory / builder.name / "lock").unlink(missing_ok=True)  # a killed process left it
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                builder.load(verbose=False)
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise LaunchError(
                f"DeepSpeed's operator {name} could not be built in {directory}: {reason};"
                " install a C++ compiler (g++), ninja and the Python headers"
            ) from error


def init_communication(device_kind: str) -> None:
    """Make DeepSpeed use the existing process group (nccl on "cuda", gloo on "cpu").

    Its shared-memory collectives, which are for inference, stay off: under `deepspeed` on a CPU
    each rank would compile them, leave 66 MiB in /dev/shm, crash where that is full, and wait for a
    dead rank in a loop that no signal interrupts.
    """
    import deepspeed

    with without_shm_collectives():
        deepspeed.init_distributed(dist_backend="nccl" if device_kind == "cuda" else "gloo")
