"""A console that goes away, is full or has another encoding does not end a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.tiny import STEPS, Tiny


def start(tiny: Tiny, *command: str, **options: object) -> subprocess.Popen[bytes]:
    flags = [str(flag) for flag in tiny.flags("run", "--set=train.log_every=1")]
    script = [sys.executable, str(ROOT / "launchers" / "train.py"), *flags]
    return subprocess.Popen([*command, *script], cwd=ROOT, **options)  # type: ignore[call-overload, no-any-return]


def is_finished(tiny: Tiny) -> bool:
    return len(tiny.losses("run")) == STEPS and (tiny.path("run") / "summary.json").exists()


@pytest.mark.dist
def test_a_closed_pipe(tiny: Tiny) -> None:
    process = start(tiny, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(80) == 0
    assert is_finished(tiny)


@pytest.mark.dist
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_and_an_ascii_terminal(tiny: Tiny) -> None:
    with open("/dev/full", "wb") as full:
        assert start(tiny, stdout=full, stderr=full).wait(80) == 0
    assert is_finished(tiny)
    ascii_only = ("env", "PYTHONIOENCODING=ascii", "LC_ALL=C")
    process = start(tiny, *ascii_only, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=80)
    assert process.returncode == 0
    assert b"validation loss" in output and output.isascii()
