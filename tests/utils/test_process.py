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
import os, pathlib, sys, time
from fgpt.utils.process import exit_with_parent
exit_with_parent(os.environ)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"


def start(tmp_path: Path, **env: str) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A launcher and its only rank."""
    file = tmp_path / "pid"
    clean = {k: v for k, v in os.environ.items() if k != "RANK"} | {"PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, "-c", RANK, file], env=clean | env)
    wait_until(lambda: file.exists() and file.read_text(), 20, "the rank")
    return launcher, psutil.Process(int(file.read_text()))


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    launcher, rank = start(tmp_path, RANK="0")
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE, 5, "the end")


def test_a_run_by_hand_outlives_its_shell(tmp_path: Path) -> None:
    shell, process = start(tmp_path)
    shell.kill()
    shell.wait()
    wait_until(lambda: process.ppid() != shell.pid, 5, "another parent")
    assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    process.send_signal(signal.SIGKILL)
