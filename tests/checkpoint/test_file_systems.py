"""File systems that fail for a moment, lack operations, or are not shared."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from fgpt.checkpoint import directory, manager, manifest
from fgpt.checkpoint.directory import CheckpointDirectory
from fgpt.checkpoint.manager import Checkpoints
from fgpt.config.schema import CheckpointConfig
from fgpt.distributed.launch import World
from fgpt.errors import CheckpointError, TrainingError
from fgpt.utils.files import LockHeldError, acquire_lock, file_lock, sync_directory
from tests.checkpoint.saved import FakeEngine, info

CPU = torch.device("cpu")


def checkpoints(
    root: Path, said: list[str] | None = None, options: CheckpointConfig | None = None
) -> Checkpoints:
    lines = [] if said is None else said
    root.parent.mkdir(parents=True, exist_ok=True)
    return Checkpoints(root, World(), CPU, options or CheckpointConfig(), lines.append)


@pytest.mark.usefixtures("one_rank")
def test_a_renamed_run_directory_is_not_made_again(tmp_path: Path) -> None:
    points = saved(tmp_path / "run" / "checkpoints", 2)
    (tmp_path / "run").rename(tmp_path / "renamed")
    engine: Any = FakeEngine(4)
    with pytest.raises(TrainingError, match="the run directory is gone: was it renamed"):
        points.save(engine, info())
    assert [path.name for path in tmp_path.iterdir()] == ["renamed"]


@pytest.mark.usefixtures("one_rank")
def test_what_is_in_the_way_of_a_save(tmp_path: Path) -> None:
    (tmp_path / "step_00000001.tmp").touch()
    (tmp_path / "step_00000002.tmp").symlink_to(tmp_path)
    assert saved(tmp_path, 2).directory.newest() == tmp_path / "step_00000002"
    (tmp_path / "latest.tmp").mkdir()
    with pytest.raises(CheckpointError, match=r"latest.tmp: is a directory: remove it"):
        CheckpointDirectory(tmp_path).prepare()


@pytest.mark.usefixtures("one_rank")
def test_names_of_any_number_of_digits(tmp_path: Path) -> None:
    points = saved(tmp_path, 99_999_999, 100_000_000)
    (tmp_path / "step_\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661").mkdir()
    assert points.directory.newest() == tmp_path / "step_100000000"
    point = points.find()
    assert point is not None and point.manifest.step == 100_000_000


def saved(root: Path, *steps: int) -> Checkpoints:
    points = checkpoints(root)
    for step in steps:
        engine: Any = FakeEngine(step)
        points.save(engine, info())
    return points


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors"])
def test_a_moment_without_the_file_system(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no damage: the file is read again, and no older checkpoint is taken."""
    points, failures = saved(tmp_path, 2, 4), [2]
    monkeypatch.setattr(manager, "RETRY_AFTER_S", (0.0, 0.0, 0.0))

    def fails_first(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **more: Any) -> Any:
            if Path(path).name == name and "step_00000004" in str(path) and failures[0] > 0:
                failures[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *args, **more)

        return call

    monkeypatch.setattr(manifest, "read_regular", fails_first(manifest.read_regular))
    monkeypatch.setattr(manifest, "sha256_file", fails_first(manifest.sha256_file))
    point = points.find()
    assert point is not None and point.manifest.step == 4 and not point.rejected
    assert failures == [0]

    failures[0] = 100
    with pytest.raises(CheckpointError, match="cannot be read now, and is kept") as error:
        points.find()
    assert os.strerror(number) in str(error.value)
    assert (tmp_path / "step_00000004").is_dir()


@pytest.mark.usefixtures("one_rank")
def test_after_the_rename_the_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing an old checkpoint fails (NFS keeps files that are open): the new one is saved."""
    saved(tmp_path, 2, 4)
    said: list[str] = []
    full = OSError(errno.ENOTEMPTY, "Directory not empty", str(tmp_path / "step_00000002"))
    monkeypatch.setattr(directory.shutil, "rmtree", mock.Mock(side_effect=full))
    engine: Any = FakeEngine(6)
    assert checkpoints(tmp_path, said).save(engine, info()) == tmp_path / "step_00000006"
    assert (tmp_path / "latest").read_text() == "step_00000006\n"
    (line,) = said
    assert "step_00000006 is saved; " in line and "Directory not empty" in line


@pytest.mark.usefixtures("one_rank")
def test_a_retry_deletes_no_checkpoint_before_the_new_one_is_complete(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    engine: Any = FakeEngine(2)
    points = checkpoints(tmp_path)
    with mock.patch.object(directory, "sync_directory", side_effect=OSError(errno.EIO, "EIO")):
        points.save(engine, info())
    point = points.find()
    assert point is not None and point.manifest.step == 2
    assert (tmp_path / "step_00000002.old").is_dir()  # until the next save


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("change", ["unlink", "truncate"])
def test_files_that_rank_0_does_not_see(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = manager.write_file

    def elsewhere(path: Path, *data: Any) -> Any:
        file = real(path, *data)
        path.unlink() if change == "unlink" else os.truncate(path, 10)
        return file

    points = saved(tmp_path, 2)
    engine: Any = FakeEngine(4)
    monkeypatch.setattr(manager, "write_file", elsewhere)
    with pytest.raises(TrainingError, match="all nodes must share the run directory"):
        points.save(engine, info())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_directories_that_cannot_be_synced(number: int, tmp_path: Path) -> None:
    with mock.patch("os.fsync", side_effect=OSError(number, "no")):
        sync_directory(tmp_path)
    with (
        mock.patch("os.fsync", side_effect=OSError(errno.EIO, "broken")),
        pytest.raises(OSError, match="broken"),
    ):
        sync_directory(tmp_path)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=failure))


@pytest.mark.usefixtures("without_flock")
def test_a_lock_without_flock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock(path, wait=False):
        with pytest.raises(LockHeldError) as error:
            acquire_lock(path, wait=False)
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(error.value)
        assert f"delete {path}.held" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    acquire_lock(path, wait=True).close()


@pytest.mark.usefixtures("without_flock")
def test_a_dead_holder(tmp_path: Path) -> None:
    held = tmp_path / "lock.held"
    pid = next(number for number in range(2**22 - 1, 0, -1) if not psutil.pid_exists(number))
    held.write_text(f"{pid} on {socket.gethostname()}\n")
    acquire_lock(tmp_path / "lock", wait=False).close()
    held.write_text(f"{pid} on another-host\n")  # its processes are not visible here
    with pytest.raises(LockHeldError, match="another-host"):
        acquire_lock(tmp_path / "lock", wait=False)
