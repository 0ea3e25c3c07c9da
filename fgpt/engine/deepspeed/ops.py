"""DeepSpeed's C++ operators, built before they are needed and never twice at a time.

Torch's builder guards itself with a lock file which survives a killed process and then hangs all
later starts. FGPT builds in a directory of its own, one process at a time under an advisory lock
that dies with its holder: an operator's lock file found while holding it is stale. A
TORCH_EXTENSIONS_DIR that you set is taken to be FGPT's own too.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgpt.config.deepspeed.check import adam_build
from fgpt.engine.deepspeed.patches import without_shm_collectives
from fgpt.errors import LaunchError
from fgpt.utils.files import file_lock


def extensions_dir() -> Path:
    """Where operators are built: TORCH_EXTENSIONS_DIR, else a folder of this environment's own."""
    own = Path(sys.prefix) / "fgpt_extensions"
    if not os.access(own.parent, os.W_OK):
        own = Path.home() / ".cache" / "fgpt_extensions"
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own)))


def operators_of(deepspeed_json: Mapping[str, Any]) -> list[str]:
    """DeepSpeed's builders of the operators that a run will compile on this machine's compiler.

    An optimizer that is not torch's is DeepSpeed's, of the kind that its place asks for.
    """
    kind = deepspeed_json["optimizer"]["type"]
    build = adam_build(deepspeed_json)
    if kind in ("Adam", "AdamW"):
        adams = {"cpu": ["CPUAdamBuilder"], "fused": ["FusedAdamBuilder"], "torch": []}
        return adams[build]
    offloaded = {"Adagrad": ["CPUAdagradBuilder"], "Lion": ["CPULionBuilder"]}
    return offloaded.get(kind, []) if build == "cpu" else []


def load_operators(names: Sequence[str]) -> None:
    """Build or load operators; later loads in this process are free.

    Raises LaunchError with the compiler's last line.
    """
    if not names:
        return
    directory = extensions_dir()
    from deepspeed.accelerator import get_accelerator

    with file_lock(directory / "fgpt.lock", wait=True):
        for name in names:
            builder = get_accelerator().create_op_builder(name)
            # nobody else builds this one here: a lock of its is a killed builder's
            (directory / builder.name / "lock").unlink(missing_ok=True)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.load(verbose=False)
            except (RuntimeError, OSError) as error:
                reason = str(error).strip().splitlines()[-1]
                raise LaunchError(
                    f"DeepSpeed's operator {name} could not be built in {directory}: {reason};"
                    " a C++ compiler (g++), ninja and the Python headers are needed"
                ) from error


def init_communication(device_kind: str) -> None:
    """Let DeepSpeed use the existing process group (nccl on "cuda", gloo on "cpu").

    Without its collectives in shared memory, which are for inference: under `deepspeed` on a CPU
    each rank would compile them, leave 66 MiB in /dev/shm for ever, crash where that is full, and
    wait for a dead rank in a loop that no signal ends.
    """
    import deepspeed

    with without_shm_collectives():
        deepspeed.init_distributed(dist_backend="nccl" if device_kind == "cuda" else "gloo")
