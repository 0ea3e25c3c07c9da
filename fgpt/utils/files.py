"""Atomic writes, file hashes and advisory locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

import psutil

LOCK_POLL_S = 0.2
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
"""Errors of a file system that lacks an operation."""


class Digest(Protocol):
    """An incremental hash (hashlib, xxhash)."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The hash so far, hexadecimal."""


def hash_file(path: Path, digest: Digest, *, follow_symlinks: bool = True) -> str:
    """Hash a file with a fresh `digest`; returns hexadecimal. Raises OSError."""
    with open(path, "rb") if follow_symlinks else open_regular(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; for files of a folder whose contents others may have made.

    Raises OSError, also for a link, and for a pipe or device, which might never end.
    """
    descriptor = no_follow(str(path), os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def open_path(file: BinaryIO, path: Path) -> str:
    """Return a path of an open file for libraries that open by path: that of the descriptor, as
    `path` may be a link by now. `path` itself where the system has no such paths.
    """
    name = f"/dev/fd/{file.fileno()}"
    return name if os.path.exists(name) else str(path)


def no_follow(path: str, flags: int) -> int:
    """An opener for `open(..., opener=no_follow)`, for files that are written in a directory where
    others may have put links. Raises OSError for a link.
    """
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.EINVAL, "is a link, not a regular file", path) from error


def read_regular(path: Path) -> bytes:
    """Return the contents of a regular file that is no link. Raises OSError."""
    with open_regular(path) as file:
        return file.read()


def sha256_file(path: Path, *, follow_symlinks: bool = True) -> str:
    """SHA-256 of a file, hexadecimal. Raises OSError."""
    return hash_file(path, hashlib.sha256(), follow_symlinks=follow_symlinks)


def sync_directory(path: Path) -> None:
    """fsync a directory, so that names created in it survive a power failure.

    Does nothing on file systems that cannot (some FUSE and network file systems).
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, *UNSUPPORTED):
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` durably: readers see the old contents or all of `data`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb", opener=no_follow) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def check_writable(folder: Path, size: int = 0) -> None:
    """Raise OSError unless `size` bytes can be written to a folder, which need not exist yet.

    Leaves nothing behind. Call it before long work.
    """
    while True:
        try:
            folder.stat()
            break
        except FileNotFoundError:
            folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))
        file.flush()


class LockHeldError(Exception):
    """Another process holds the lock; `pid` names it, also its host if known, or is "unknown"."""

    def __init__(self, pid: str):
        super().__init__(f"held by process {pid}")
        self.pid = pid


def acquire_lock(path: Path, *, wait: bool) -> FileIO:
    """Lock the file `path` and write this process's pid into it; returns the open file.

    Closing the file, or the death of the process, releases the lock. Raises LockHeldError unless
    `wait`, and OSError. Without flock (some network file systems) the lock is a second file.
    """
    while True:
        file = FileIO(no_follow(str(path), os.O_RDWR | os.O_CREAT), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the previous holder may have unlinked the file: then this lock excludes nothing
            if _is_same_file(path, file):
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}\n".encode())
                return file
        except BlockingIOError:
            if not wait:
                pid = file.read().decode().strip() or "unknown"
                file.close()
                raise LockHeldError(pid) from None
            time.sleep(LOCK_POLL_S)
        except OSError as error:
            file.close()
            if error.errno not in UNSUPPORTED:
                raise
            if (lock := _lock_by_name(path.with_name(path.name + ".held"), wait=wait)) is not None:
                return lock
            time.sleep(LOCK_POLL_S)
            continue
        file.close()


class _NamedLock(FileIO):
    """A lock that exists as long as its file does; a dead holder's is recognized by its pid."""

    def close(self) -> None:
        if not self.closed:
            Path(str(self.name)).unlink(missing_ok=True)
        super().close()


def _lock_by_name(path: Path, *, wait: bool) -> _NamedLock | None:
    """Create the lock file `path`; None: held, try again. Raises LockHeldError unless `wait`."""
    own_host = socket.gethostname()
    try:
        lock = _NamedLock(path, "x+")
    except FileExistsError:
        pid, _, host = _read_text(path).strip().partition(" on ")
        # the holder writes its name right after creating the file; a killed one never removes it
        is_dead = pid.isdecimal() and host == own_host and not psutil.pid_exists(int(pid))
        if is_dead:
            path.unlink(missing_ok=True)
        elif not wait:
            holder = f"{pid} on {host} (if it has ended, delete {path})" if host else "unknown"
            raise LockHeldError(holder) from None
        return None
    lock.write(f"{os.getpid()} on {own_host}\n".encode())
    return lock


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file `path`, which is deleted afterwards. Raises as `acquire_lock`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with acquire_lock(path, wait=wait):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_same_file(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
