"""Files in a directory where somebody may have put a link: neither read nor overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fgpt.checkpoint.tensor_file import TensorFile
from fgpt.errors import LaunchError
from fgpt.train.run_dir import RunDir
from fgpt.utils.files import acquire_lock, no_follow, open_regular, sha256_file, write_atomic


def _append(path: Path) -> None:
    with open(path, "ab", opener=no_follow) as file:
        file.write(b"mine")


OPENINGS: dict[str, Callable[[Path], object]] = {
    "read": lambda path: open_regular(path).close(),
    "hash": lambda path: sha256_file(path, follow_symlinks=False),
    "append": _append,
    "lock": lambda path: acquire_lock(path, wait=False).close(),
    "tensors": TensorFile,
}


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("target", ["precious", "new"])
def test_no_opening_follows_a_link(tmp_path: Path, opening: str, target: str) -> None:
    (tmp_path / "precious").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(OSError, match="is a link, not a regular file"):
        OPENINGS[opening](tmp_path / "link")
    assert (tmp_path / "precious").read_text() == "old" and not (tmp_path / "new").exists()


def test_an_atomic_write_is_not_led_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("old")
    (tmp_path / "file.tmp").symlink_to("precious")
    with pytest.raises(OSError, match="is a link"):
        write_atomic(tmp_path / "file", b"new")
    (tmp_path / "file").symlink_to("precious")
    write_atomic(tmp_path / "file", b"new")  # takes the link's place
    assert (tmp_path / "precious").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()


def test_a_file_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors opens the file that was checked, not what its path has become."""
    names = ("checked", "other")
    for name in names:
        save_file({name: torch.zeros(1)}, tmp_path / name)

    def replace_after_opening(path: Path) -> object:
        file = open_regular(path)
        path.unlink()
        path.symlink_to("other")
        return file

    monkeypatch.setattr("fgpt.checkpoint.tensor_file.open_regular", replace_after_opening)
    assert TensorFile(tmp_path / "checked").keys() == {"checked"}


def test_a_linked_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("old")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(LaunchError, match="run/lock: is a link"):
        RunDir(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "old"


def test_a_run_directory_is_its_owners(tmp_path: Path) -> None:
    """A new one; one that the user has opened stays open, also for the next run of its name."""

    def mode(path: Path) -> int:
        return os.stat(path).st_mode & 0o777

    old = os.umask(0o022)
    try:
        run = RunDir(tmp_path / "runs" / "run")
        assert mode(run.path) == 0o700 and mode(run.path.parent) == 0o755
        run.path.chmod(0o750)
        (run.path / "metrics.jsonl").touch()
        assert run.move_earlier_run() == tmp_path / "runs" / "run.1"
        assert mode(run.path) == mode(tmp_path / "runs" / "run.1") == 0o750
        run.lock.close()
        (tmp_path / "open").mkdir(0o755)
        RunDir(tmp_path / "open").lock.close()
        assert mode(tmp_path / "open") == 0o755
    finally:
        os.umask(old)
