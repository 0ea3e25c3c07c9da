"""Checkpoint files: hashed, synced, never code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch

from fgpt.engine.tensor_files import read_tensors, refuse_code, write_tensors
from fgpt.errors import CheckpointError


class Payload:
    """Unpickling it creates a directory."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def test_written_read_and_hashed(tmp_path: Path) -> None:
    value = {"w": torch.arange(10_000.0), "n": 3, "text": "x", "list": [1, (2, None)]}
    saved = write_tensors(value, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    assert saved.name == "a.pt" and saved.size_bytes == len(data)
    assert saved.sha256 == hashlib.sha256(data).hexdigest()
    refuse_code(tmp_path / "a.pt")
    back = read_tensors(tmp_path / "a.pt")
    assert torch.equal(back.pop("w"), value.pop("w")) and back == value


def test_a_file_that_takes_a_part_at_a_time(tmp_path: Path) -> None:
    """write(2) takes 2 GiB at most: a larger tensor was once truncated and hashed as complete."""
    value = {"w": torch.arange(10_000.0)}
    whole = write_tensors(value, tmp_path / "whole.pt")

    class Short(io.FileIO):
        def write(self, data):  # type: ignore[no-untyped-def]
            return super().write(memoryview(data)[:1000])

    with mock.patch(
        "fgpt.engine.tensor_files.open", lambda path, *_, **__: Short(path, "xb"), create=True
    ):
        parts = write_tensors(value, tmp_path / "parts.pt")
    assert parts.size_bytes == (tmp_path / "parts.pt").stat().st_size == whole.size_bytes
    assert parts.sha256 == hashlib.sha256((tmp_path / "parts.pt").read_bytes()).hexdigest()
    assert torch.equal(read_tensors(tmp_path / "parts.pt")["w"], value["w"])


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_tensors({}, tmp_path / "a.pt")
    with pytest.raises(FileExistsError):
        write_tensors({}, tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    path, canary = tmp_path / "a.pt", tmp_path / "canary"
    if zipped:
        torch.save({"x": Payload(canary)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match="a.pt"):
        refuse_code(path)
    with pytest.raises(CheckpointError, match="a.pt"):
        read_tensors(path)
    assert not canary.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)  # what others do
    assert canary.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.pt"
    write_tensors({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="a.pt: cannot be read"):
        read_tensors(path)


def test_a_full_disk_is_an_os_error_with_the_files_name(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    path = tmp_path / "a.pt"
    with mock.patch("fgpt.engine.tensor_files._HashingFile.write", autospec=True) as write:

        def fail(self, data: bytes) -> int:  # type: ignore[no-untyped-def]
            self.error = full
            raise full

        write.side_effect = fail
        with pytest.raises(OSError, match="No space left") as caught:
            write_tensors({"w": torch.ones(1000)}, path)
    assert caught.value.errno == 28 and caught.value.filename == str(path)
