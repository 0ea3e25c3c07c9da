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
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fgpt.tokenizer.errors import NoFastEncoder

HERE = Path(__file__).parent
FLAGS = ("-std=c11", "-O3", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
LIMIT_S = 120


def shared_object(folders: Sequence[Path] | None = None) -> Path:
    """The compiled sources, in the first of `folders` that has them; else compiled into the first
    that takes them.

    Raises NoFastEncoder: no compiler, they do not compile, no folder can be used.
    """
    sources = sorted(HERE.glob("*.c"))
    if not sources:
        raise NoFastEncoder("the C sources of wordwise are not installed")
    chosen = os.environ.get("CC", "")
    facts = (chosen, *FLAGS, platform.machine(), platform.system(), *platform.libc_ver())
    digest = hashlib.sha256("\0".join(facts).encode())
    for file in (*sources, *sorted(HERE.glob("*.h"))):
        digest.update(file.read_bytes())
    name = f"wordwise-{digest.hexdigest()[:16]}.so"
    places = [folder / name for folder in (_folders() if folders is None else folders)]
    for place in places:
        if _is_trusted(place.parent) and _is_trusted(place):
            return place
    command = [*_compiler(chosen), *FLAGS]
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if _is_trusted(place.parent):
                _compile(command, sources, place)
                return place
    raise NoFastEncoder("no folder for compiled sources can be written to")


def _folders() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [
        folder for folder in (HERE / "__pycache__", Path(cache) / "fgpt") if folder.is_absolute()
    ]


def _is_trusted(path: Path) -> bool:
    """Whether only this user, or the owner of these sources, can have put there what is there."""
    try:
        found = path.lstat()
    except OSError:
        return False
    owners = (os.geteuid(), HERE.stat().st_uid)
    return not stat.S_ISLNK(found.st_mode) and found.st_uid in owners and not found.st_mode & 0o022


def _compiler(chosen: str) -> list[str]:
    """The command of $CC, else the first of COMPILERS that is there."""
    try:
        found = shlex.split(chosen)
    except ValueError as error:
        raise NoFastEncoder(f"CC is no command: {chosen!r} ({error})") from error
    found = found or [path for name in COMPILERS if (path := shutil.which(name))][:1]
    if not found:
        raise NoFastEncoder("no C compiler: install one (gcc, clang) or set CC")
    return found


def _compile(command: Sequence[str], sources: Sequence[Path], place: Path) -> None:
    """Make `place`, durably and at once."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix="wordwise-") as work:
        made = Path(work) / place.name
        with (Path(work) / "log").open("w+b") as log:  # no pipe: who holds it may outlive a limit
            _run([*command, "-o", str(made), *map(str, sources), "-lm"], log)
        made.chmod(0o755)
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        made.replace(place)


def _run(command: Sequence[str], log: BinaryIO) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoFastEncoder(f"the C compiler {command[0]} cannot be run ({error})") from error
    if done.returncode:
        log.seek(0)
        told = log.read().decode(errors="replace").strip()
        lines = (told or f"exit code {done.returncode}").splitlines()
        fault = next((line for line in lines if "error" in line), lines[0])
        raise NoFastEncoder(f"the C compiler {command[0]} failed ({fault})")
