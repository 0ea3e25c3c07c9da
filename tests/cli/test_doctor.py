"""`fgpt doctor` as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fgpt.cli import main
from tests.ranks import ROOT
from tests.tiny import Tiny


def doctor(*flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fgpt.cli", "doctor", *flags]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=100)


@pytest.mark.dist
def test_the_page(tiny: Tiny) -> None:
    """A layout and a configuration; from another directory, in which it leaves nothing."""
    start = time.monotonic()
    flags = [*tiny.flags("run"), "--tp", "2", "--ranks", "2", "--json"]
    before = sorted(tiny.folder.rglob("*"))
    done = doctor(*flags, cwd=tiny.folder)
    assert time.monotonic() - start < 60  # 20 s on an idle machine
    assert done.returncode == 0, done.stdout + done.stderr
    page = json.loads(done.stdout)
    assert page["ranks"] == 2 and page["grade"] != "error"
    value_by_check = {check["what"]: check["value"] for check in page["checks"]}
    for what in ("configuration", "data", "FGPT's code", "versions on the ranks"):
        assert value_by_check[what] == "the same on all ranks", what
    assert "the run's checkpoints need" in value_by_check["free disk"]
    assert any(what.startswith("tensor-parallel groups (1 of 2 ranks") for what in value_by_check)
    assert not any(what.startswith("data-parallel") for what in value_by_check)
    assert {"clocks", "clock"} & value_by_check.keys()
    assert sorted(tiny.folder.rglob("*")) == before


@pytest.mark.dist
def test_an_error_is_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor("--ranks", "1", "--run_dir", "file/run", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    where = next(i for i, line in enumerate(lines) if line.startswith("error "))
    assert "run directory" in lines[where] and "Not a directory" in lines[where]
    assert "-> name a --run_dir that can be made and written" in lines[where + 1]
    assert lines[-1].startswith("1 rank: ") and lines[-1].endswith("1 error")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ranks", "3", "--tp", "2"], "3 ranks are not a multiple of tp 2: change --ranks"),
        (["--ranks", "0"], "0 is not a whole number >= 1"),
        (["--set", "nothing=1"], "nothing"),
        (["--data", "a:0.5,a:0.5"], "data.path: 'a' is listed twice: write DIR"),
        (["--ds_config", "absent.json"], "absent.json: does not exist"),
    ],
)
def test_wrong_input(
    flags: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        code: object = main(["doctor", *flags])
    except SystemExit as stop:  # argparse's
        code = stop.code
    assert code == 2 and says in capsys.readouterr().err


def test_a_launcher_has_its_own_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--ranks", "4"]) == 2
    assert "--ranks 4: the launcher started 2; leave the flag out" in capsys.readouterr().err
