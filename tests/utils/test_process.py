"""Ranks end with their launcher; a run started by hand outlives its shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.ranks import ROOT, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")

RANK = """
import os, pathlib, signal, sys, time
from fgpt.utils import process
process.ORPHAN_S = 1.0
process.exit_with_parent(os.environ)
if sys.argv[2:] == ["ignores signals"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"


def start(tmp_path: Path, *more: str, **env: str) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A launcher and its only rank."""
    file = tmp_path / "pid"
    clean = {k: v for k, v in os.environ.items() if k != "RANK"} | {"PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, "-c", RANK, file, *more], env=clean | env
    )
    wait_until(lambda: file.exists() and file.read_text(), 20, "the rank")
    return launcher, psutil.Process(int(file.read_text()))


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    launcher, rank = start(tmp_path, RANK="0")
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE, 5, "the end")


@pytest.mark.parametrize("doing", ["ignores signals", "stopped"])
def test_a_rank_that_handles_no_signal_ends_with_its_launcher(tmp_path: Path, doing: str) -> None:
    launcher, rank = start(tmp_path, doing, RANK="0")
    (guardian,) = rank.children()
    if doing == "stopped":
        rank.suspend()
    launcher.kill()
    launcher.wait()
    for process in (rank, guardian):
        wait_until(lambda process=process: is_gone(process), 5, "the end")


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_the_guardian_ends_with_its_rank(tmp_path: Path) -> None:
    launcher, rank = start(tmp_path, RANK="0")
    (guardian,) = rank.children()
    assert not set(guardian.environ()) & {"RANK", "PATH"}
    rank.kill()
    wait_until(lambda: is_gone(guardian), 5, "the end")
    launcher.wait()


def test_a_run_by_hand_outlives_its_shell(tmp_path: Path) -> None:
    shell, process = start(tmp_path)
    shell.kill()
    shell.wait()
    wait_until(lambda: process.ppid() != shell.pid, 5, "another parent")
    assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    process.send_signal(signal.SIGKILL)
