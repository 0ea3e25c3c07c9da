"""The run directory: one lock, earlier runs renamed, metrics truncated."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from fgpt.errors import LaunchError
from fgpt.train.run_dir import RunDir


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first = RunDir(tmp_path / "run")
    with pytest.raises(LaunchError, match=f"process {os.getpid()}"):
        RunDir(tmp_path / "run")
    first.lock.close()
    RunDir(tmp_path / "run").lock.close()


def test_what_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LaunchError, match="--run_dir"):
            RunDir(path)


def test_starting_afresh_keeps_the_earlier_run_and_the_hold(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.move_earlier_run() is None  # nothing was trained here
    for number in (1, 2):
        (run.path / "metrics.jsonl").write_text(f"{number}")
        assert run.move_earlier_run() == tmp_path / f"run.{number}"
        assert not (run.path / "metrics.jsonl").exists()
        with pytest.raises(LaunchError):
            RunDir(run.path)
    assert (tmp_path / "run.1" / "metrics.jsonl").read_text() == "1"
    run.lock.close()


def test_a_linked_run_directory_stays_a_link(tmp_path: Path) -> None:
    """Its link is to a larger disk: the earlier run moves there, and the next one is made there."""
    (tmp_path / "link").symlink_to("disk/run")
    (tmp_path / "disk").mkdir()
    run = RunDir(tmp_path / "link")  # what it points to does not exist yet
    (run.path / "metrics.jsonl").write_text("1")
    assert run.move_earlier_run() == tmp_path / "disk" / "run.1"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "run" / "lock").exists()
    assert (tmp_path / "disk" / "run.1" / "metrics.jsonl").read_text() == "1"
    run.lock.close()


def test_a_directory_that_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point: the earlier run moves into a directory inside it."""
    run = RunDir(tmp_path / "run")
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path == run.path:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    for number in (1, 2):
        for name in ("metrics.jsonl", "config.json"):
            (run.path / name).write_text(f"{number}")
        (run.path / "checkpoints").mkdir()
        assert run.move_earlier_run() == run.path / f"run.{number}"
        with pytest.raises(LaunchError):  # still locked
            RunDir(run.path)
    assert sorted(path.name for path in run.path.iterdir()) == ["lock", "run.1", "run.2"]
    moved = sorted(path.name for path in (run.path / "run.2").iterdir())
    assert moved == ["checkpoints", "config.json", "metrics.jsonl"]
    assert (run.path / "run.1" / "metrics.jsonl").read_text() == "1"
    run.lock.close()


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.truncate_records(2)  # no file yet
    records = [{"step": step, "loss": 1.0} for step in (0, 1, 2, 3, 4)]
    lines = [json.dumps(record) for record in records]
    other = ["", "[]", "7", "{}", '{"step": null}', '{"step": "1"}', "[" * 9999, "\udcff"]
    text = "\n".join([*lines[:2], *other, *lines[2:]]) + '\n{"step": 5, "lo'
    (tmp_path / "metrics.jsonl").write_bytes(os.fsencode(text))
    run.truncate_records(3)
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:4]) + "\n"
    run.truncate_records(0)
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0] + "\n"
    run.lock.close()


def test_metrics_that_are_no_file(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(LaunchError, match="not a regular file; move it away"):
        run.truncate_records(2)
    run.lock.close()


@pytest.mark.parametrize("name", ["step_00000004", os.fsdecode(b"\xff")])
def test_names_that_a_run_cannot_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(LaunchError, match="choose another"):
        RunDir(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_json_is_written_whole(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_json("config.json", {"a": 1})
    with pytest.raises(TypeError):
        run.write_json("config.json", {"a": object()})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    run.lock.close()
