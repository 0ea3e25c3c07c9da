"""A signal during imports, or while C code waits, is one line and an exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.ranks import ROOT

SCRIPT = """
import ctypes, signal
from fgpt.utils.startup_signals import signals_exit_at_once
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests' shell may ignore it
with signals_exit_at_once():
    print("ready", flush=True)
    {wait}
signal.raise_signal(signal.SIGINT)
"""
WAITS = {"python": "while True: pass", "C": "ctypes.CDLL(None).sleep(60)"}


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_line_at_once(number: signal.Signals, wait: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(wait=WAITS[wait])]
    with started(command) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert errors == f"fgpt: stopped by {number.name} while starting\n"


def test_without_a_reader_of_the_line() -> None:
    """As when a terminal closes."""
    command = [sys.executable, "-c", SCRIPT.format(wait=WAITS["python"])]
    with started(command) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready; it does not outlive the context."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def test_afterwards_signals_are_pythons() -> None:
    command = [sys.executable, "-c", SCRIPT.format(wait="pass")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert finished.stderr.rstrip().endswith("KeyboardInterrupt")
