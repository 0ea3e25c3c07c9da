"""This process: its memory, its allocator, and its exit when its launcher dies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1  # prctl(2)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
ORPHAN_S = 8.0
"""Time that a rank has to save and exit after the death of its launcher, in seconds."""
DETACHED_S = 120.0
"""The same where only the `deepspeed` command above the launcher has died: it exits at SIGTERM, and
its ranks save behind it."""
GUARDIAN = """
import select, signal, sys
pid, orphan_s, detached_s, rank, parent, *above = map(float, sys.argv[1:])
rank, parent, *above = map(int, [rank, parent, *above])
ended = lambda seconds, *which: select.select([rank, *which], [], [], seconds)[0]
if rank not in ended(None, parent, *above) and not ended(orphan_s):
    stat = open(f"/proc/{int(pid)}/stat").read().rpartition(")")[2].split()
    if not select.select([parent], [], [], 0)[0] and stat[0] not in "Tt":
        ended(detached_s)
    signal.pidfd_send_signal(rank, signal.SIGKILL)
"""
"""The program of `_start_guardian`: waits for the rank's end or a launcher's."""
KEPT_BYTES = 2**26
"""Largest freed block that malloc keeps. Up to version 2.37, glibc may leave seven aligned blocks
of one size unused before it reuses one, so a larger limit costs memory.
"""


def resident_bytes() -> int:
    """Resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def anonymous_bytes() -> int:
    """Resident memory of this process without pages of mapped files, in bytes."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def tree_resident_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and its descendants, in bytes; 0 after its end."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def reset_peak_resident() -> None:
    """Reset `peak_resident_bytes` to the current value, where the kernel allows it (Linux)."""
    with contextlib.suppress(OSError):  # some containers forbid it
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def peak_resident_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # not Linux
        fields = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split(maxsplit=1)
        return int(fields[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def signal_on_parent_death(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum)


def keep_freed_memory(environ: Mapping[str, str]) -> bool:
    """Have malloc keep freed blocks of up to KEPT_BYTES for the next tensor; True if it does.

    By default glibc returns blocks above 32 MiB, and the end of its heap, to the kernel at once;
    the next tensor gets new pages, zeroed one page fault at a time. A training step of a small GPT
    has 35,000 of them, a tenth of its time. Does nothing without glibc, or if the environment
    configures malloc (MALLOC_..., GLIBC_TUNABLES).
    """
    configured = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environ)
    if configured or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # older versions accept at most half of it
    kept = mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 2)
    return bool(kept) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def exit_with_parent(environ: Mapping[str, str]) -> None:
    """Have this rank get SIGTERM when its launcher dies, and SIGKILL ORPHAN_S later (Linux only).

    The `deepspeed` command adds two processes above each rank: launch.py, the parent, which the
    kernel watches; and the process that the user started and may kill, which a thread watches. A
    process without a launcher is no rank and outlives its shell: `nohup python launchers/train.py`.
    """
    if sys.platform != "linux" or not {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"} & {*environ}:
        return
    parent = os.getppid()
    signal_on_parent_death(signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before prctl
        _terminate_self()
    launchers = [parent]
    # no pidfd (Linux before 5.3, seccomp), no /proc, no setsid
    with contextlib.suppress(OSError, NotImplementedError):
        if "deepspeed.launcher.launch" in _command_line(parent):
            stat = Path(f"/proc/{parent}/stat").read_text()  # proc(5): pid (name) state ppid
            grandparent = int(stat.rpartition(")")[2].split()[1])
            if "deepspeed" in _command_line(grandparent):
                descriptor = os.pidfd_open(grandparent)
                threading.Thread(target=_terminate_after, args=(descriptor,), daemon=True).start()
                launchers.append(grandparent)
        _start_guardian(launchers)


def _start_guardian(launchers: Sequence[int]) -> None:
    """Start a process that kills this rank some time after its parent, or the one above, has died.

    A rank that is stopped, or whose threads all wait for the interpreter's lock, handles no signal.
    The guardian ends with the rank.
    """
    descriptors = [os.pidfd_open(pid) for pid in (os.getpid(), *launchers)]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    arguments = map(str, (os.getpid(), ORPHAN_S, DETACHED_S, *descriptors))
    null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", "-c", GUARDIAN, *arguments],
        {},
        file_actions=null,  # readers of the rank's output wait for its end only
        setsid=True,  # the launcher's signals to its process group are not for the guardian
    )
    for descriptor in descriptors:
        os.close(descriptor)


def process_key(pid: int) -> str:
    """Identify a process: its id is used again later, and on other machines.

    Raises OSError or psutil.NoSuchProcess if there is none.
    """
    if sys.platform != "linux":
        return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time()}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return f"{socket.gethostname()} {boot} {pid} {fields[19]}"  # proc(5): starttime


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _terminate_after(pidfd: int) -> None:
    select.select([pidfd], [], [])
    _terminate_self()


def _terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
