"""C sources -> a shared object, once: by this machine's C compiler, in a second or two.

It lies where Python keeps its own compiled files, in `__pycache__`, or in the user's cache where
that cannot be written to. Its name has a hash of the sources and of the command, so it is never
stale, and it gets that name when it is complete: processes may do this at the same time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fgpt.data.tokenizer.refusal import NoFastEncoder

HERE = Path(__file__).parent
FLAGS = ("-std=c11", "-O3", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
LIMIT_S = 120


def shared_object(folders: Sequence[Path] | None = None) -> Path:
    """The compiled sources, in the first of `folders` that has them or takes them.

    Raises NoFastEncoder: no compiler, they do not compile, no folder can be written to.
    """
    command = [*_compiler(), *FLAGS]
    sources = sorted(HERE.glob("*.c"))
    digest = hashlib.sha256(
        "\0".join([*command, platform.machine(), platform.system(), *platform.libc_ver()]).encode()
    )
    for file in (*sources, *sorted(HERE.glob("*.h"))):
        digest.update(file.read_bytes())
    name = f"wordwise-{digest.hexdigest()[:16]}.so"
    chosen = _folders() if folders is None else folders
    for folder in chosen:
        if _is_ours(folder / name):
            return folder / name
    for folder in chosen:
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="wordwise-") as work:
                made = Path(work) / name
                _run([*command, "-o", str(made), *map(str, sources), "-lm"])
                return made.replace(folder / name)
    raise NoFastEncoder("no folder for compiled sources can be written to")


def _compiler() -> list[str]:
    """The command of $CC, else the first of COMPILERS that is there."""
    chosen = shlex.split(os.environ.get("CC", ""))
    found = chosen or [path for name in COMPILERS if (path := shutil.which(name))][:1]
    if not found:
        raise NoFastEncoder("no C compiler: install one (gcc, clang) or set CC")
    return found


def _folders() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [HERE / "__pycache__", Path(cache) / "fgpt"]


def _is_ours(file: Path) -> bool:
    """Whether this user, or the owner of these sources, made the file."""
    try:
        return file.stat().st_uid in (os.geteuid(), HERE.stat().st_uid)
    except OSError:
        return False


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoFastEncoder(f"the C compiler {command[0]} cannot be run ({error})") from error
    if done.returncode:
        lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        fault = next((line for line in lines if "error" in line), lines[0])
        raise NoFastEncoder(f"the C compiler {command[0]} failed ({fault})")
