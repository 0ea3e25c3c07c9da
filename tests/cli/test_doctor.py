"""`fgpt doctor` as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fgpt.cli import main
from fgpt.doctor import devices
from tests.ranks import ROOT, start_ranks
from tests.tiny import Tiny


@pytest.mark.dist
def test_the_page(tiny: Tiny) -> None:
    """A layout and a configuration; from another directory, in which it leaves nothing."""
    flags = [*tiny.flags("run"), "--tp", "2", "--ranks", "2", "--json"]
    before = sorted(tiny.folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "fgpt.cli", "doctor", *flags],
        capture_output=True,
        text=True,
        cwd=tiny.folder,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=170,
    )
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
def test_an_error_is_the_exit_code_of_all_ranks(tmp_path: Path) -> None:
    """Ranks of a launcher, of which rank 0 prints."""
    (tmp_path / "file").touch()
    with start_ranks(_doctor, 2, "--run_dir", str(tmp_path / "file" / "run"), join=False) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        assert ranks.results() == [1, 1]
        lines, silent = ranks.output(0).splitlines(), ranks.output(1)
    assert silent == ""
    where = next(i for i, line in enumerate(lines) if line.startswith("error "))
    assert "run directory" in lines[where] and "Not a directory" in lines[where]
    assert "-> name a --run_dir that can be made and written" in lines[where + 1]
    assert lines[-1].startswith("2 ranks: ") and lines[-1].endswith("1 error")
    assert any("the ranks met at 127.0.0.1:" in line for line in lines)
    assert any("data-parallel groups (1 of 2 ranks)" in line for line in lines)


def _doctor(world: object, *flags: str) -> int:
    devices.TIMED_S = 0.01
    return main(["doctor", *flags])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ranks", "3", "--tp", "2"], "3 ranks are not a multiple of tp 2: change --ranks"),
        (["--ranks", "0"], "0 is not a whole number from 1 to 10^9"),
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


def test_a_port_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", "70000")
    assert main(["doctor"]) == 2
    assert "MASTER_PORT=70000 is not a port" in capsys.readouterr().err


def test_a_launcher_has_its_own_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--ranks", "4"]) == 2
    assert "--ranks 4: the launcher started 2; leave the flag out" in capsys.readouterr().err
