"""Files that are complete or absent: durable writes, hashes, and one writer per data set."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from fgpt.errors import DataError

LOCK_POLL_S = 0.2


class Digest(Protocol):
    """A hash that is being computed (hashlib, xxhash)."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The hash so far, hexadecimal."""


def hash_file(path: Path, digest: Digest) -> str:
    """Hash of a file's bytes by a fresh `digest`, hexadecimal."""
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    return hash_file(path, hashlib.sha256())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes) -> None:
    """Write `path` so that a reader sees all of `data` or the file that was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with tmp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextmanager
def one_writer(target: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of `target`: a file beside it, gone afterwards; freed when its holder dies.

    A second writer waits, or raises DataError with the holder's pid.
    """
    path = target.with_name(target.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path, wait: bool) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file before it lets go: a lock on a removed file is none.
            if _is_still(path, handle):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except BlockingIOError:
            if not wait:
                pid = os.pread(handle, 32, 0).decode().strip() or "unknown"
                os.close(handle)
                raise DataError(f"{path}: being written by process {pid}; wait for it") from None
            time.sleep(LOCK_POLL_S)
        os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
