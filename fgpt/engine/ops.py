"""DeepSpeed's C++ operators, built before they are needed and never twice at a time.

Torch's builder guards itself with a lock file which survives a killed process and then hangs every
later start (traps.md, D21). FGPT builds in a directory of its own, one process at a time under an
advisory lock that dies with its holder: a lock file found while holding it is stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fgpt.errors import LaunchError


def extensions_dir() -> Path:
    """Where operators are built: TORCH_EXTENSIONS_DIR, else a folder of this environment's own."""
    own = Path(sys.prefix) / "fgpt_extensions"
    if not os.access(own.parent, os.W_OK):
        own = Path.home() / ".cache" / "fgpt_extensions"
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own)))


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "fgpt.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for stale in directory.glob("*/lock"):
            stale.unlink(missing_ok=True)
        yield


def operators_of(deepspeed_json: dict[str, Any], device: str) -> list[str]:
    """DeepSpeed's builders of the operators that a run will compile on this machine's compiler.

    On a CPU `init_distributed` wants shared-memory collectives; optimizer offload wants a CPU
    optimizer on any device; Adam that is not torch's own wants DeepSpeed's.
    """
    names = ["ShareMemCommBuilder"] if device == "cpu" else []
    optimizer = deepspeed_json["optimizer"]
    kind = optimizer["type"].lower()
    if optimizer.get("params", {}).get("torch_adam", False):
        return names
    offloaded = "offload_optimizer" in deepspeed_json.get("zero_optimization", {})
    if offloaded:
        kinds = {"adam": "CPUAdam", "adamw": "CPUAdam", "adagrad": "CPUAdagrad", "lion": "CPULion"}
    else:
        kinds = {"adam": "FusedAdam", "adamw": "FusedAdam"} if device == "cpu" else {}
    return names + [f"{kinds[kind]}Builder"] if kind in kinds else names


def load_operators(names: list[str]) -> None:
    """Build or load operators; later loads in this process are free.

    Raises LaunchError with the compiler's last line.
    """
    directory = extensions_dir()
    from deepspeed.accelerator import get_accelerator

    with _exclusive(directory):
        for name in names:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    get_accelerator().create_op_builder(name).load(verbose=False)
            except (RuntimeError, OSError) as error:
                reason = str(error).strip().splitlines()[-1]
                raise LaunchError(
                    f"DeepSpeed's operator {name} could not be built in {directory}: {reason};"
                    " a C++ compiler (g++), ninja and the Python headers are needed"
                ) from error


if __name__ == "__main__":
    # `make install`: build what every CPU run loads, so that the first run does not wait for it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    load_operators(["ShareMemCommBuilder"])
