"""The directory of a conversion: complete or not there, and its names in messages."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from fgpt.cli import main
from fgpt.convert.convert import LOCK, new_directory
from fgpt.errors import CheckpointError, UserError
from tests.convert.models import save_random, small_config


def test_complete(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with new_directory(out) as folder:
        (folder / "file").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_errors_name_out(tmp_path: Path) -> None:
    """Not the directory that is gone by then."""
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=f"^{out}/x: bad"), new_directory(out) as folder:
        raise CheckpointError(f"{folder}/x: bad")
    with pytest.raises(FileNotFoundError) as error, new_directory(out) as folder:
        (folder / "a" / "b").touch()
    assert error.value.filename == str(out / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as error, new_directory(tmp_path / "file" / "x"):
        pass
    assert not error.value.filename.endswith(".tmp")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/", "exists already"),
        (".", "exists already"),
        ("..", "exists already"),
        ("missing/..", "is no name"),
        ("a\nb", "control characters"),
        ("a\tb/c", "control characters"),
        (os.fsdecode(b"a\xff"), "not UTF-8"),
    ],
)
@pytest.mark.parametrize("way", ["--to", "--from"])
def test_names(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    said: str,
    way: str,
) -> None:
    run = save_random(tmp_path / "run", small_config())
    monkeypatch.chdir(tmp_path)
    if way == "--from":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert main(["convert", str(run), "--to", "hf", "--out", "hf"]) == 0
        run = tmp_path / "hf"
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["convert", str(run), way, "hf", "--out", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and ".tmp" not in line and "remove" not in line
    assert sorted(tmp_path.iterdir()) == before


def _killed(out: Path) -> None:
    with new_directory(out) as folder:
        (folder / "half").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_left_by_a_killed_conversion(tmp_path: Path) -> None:
    """Removed by the next one."""
    out = tmp_path / "out"
    process = get_context("spawn").Process(target=_killed, args=(out,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "out.tmp").iterdir()) == [LOCK, "half"]
    with new_directory(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list(out.iterdir())


def test_in_use_by_another_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as folder:
        (folder / "mine").touch()
        said = f"process {os.getpid()}.* is writing it"
        with pytest.raises(UserError, match=said), new_directory(out):
            pass
        assert (folder / "mine").exists()
    assert (out / "mine").exists()


@pytest.mark.parametrize("what", ["folder", "file", "link", "link as lock"])
def test_of_another_program(tmp_path: Path, what: str) -> None:
    """Nothing that no conversion has made is removed."""
    out, other = tmp_path / "out", tmp_path / "out.tmp"
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / LOCK).touch()
    if what == "file":
        other.touch()
    elif what == "link":
        other.symlink_to("kept")
    else:
        other.mkdir()
    if what == "link as lock":
        (other / LOCK).symlink_to(tmp_path / "kept" / LOCK)
    with pytest.raises(UserError, match=r"out\.tmp.*rename it"), new_directory(out):
        pass
    assert os.path.lexists(other) and (tmp_path / "kept" / LOCK).exists() and not out.exists()
