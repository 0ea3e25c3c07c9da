"""A destination that fails for a while costs what it could not take, and says so."""

from __future__ import annotations

import io
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fgpt.utils.console import Outage, SafeStream
from tests.ranks import ROOT

FULL_FOR_A_WHILE = """
import resource, sys
from fgpt.utils.console import protect_console
protect_console()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
print("before", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (7, hard))
for step in range(3):
    print("step", step, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print("after", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (7, hard))
print("the last line")
"""


def test_output_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    out = tmp_path / "out"
    with open(out, "wb") as file:
        command = [sys.executable, "-c", FULL_FOR_A_WHILE]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = out.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after"
    assert any(line.startswith("fgpt: output is missing here: ") for line in lines)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_were_closed_at_the_start(closed: str) -> None:
    code = (
        "from fgpt.utils.console import protect_console, protected_stderr\n"
        "import sys\n"
        "with protected_stderr():\n    print('first', file=sys.stderr, flush=True)\n"
        "protect_console()\n"
        "print('second', flush=True)\nprint('third', file=sys.stderr, flush=True)\n"
    )
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (b"" if closed.startswith(">") else b"second\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"first\nthird\n")


def test_a_reader_that_is_gone_stays_gone() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    stream = SafeStream(Closed())
    assert stream.write("text") == 4  # nothing is raised


def test_an_outage_is_said_once_and_counted() -> None:
    said: list[str] = []
    outage = Outage(said.append)
    outage.succeeded("written")
    for _ in range(3):
        outage.failed("no room")
    outage.succeeded("written")
    outage.succeeded("written")
    assert said == ["no room", "written, after 3 failed writes"]
