"""The manifest, byte by byte, and the identity of a run; without ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fgpt.checkpoint.identity import changed_settings, check_identity
from fgpt.checkpoint.manifest import (
    FILE,
    HASH_KEY,
    Manifest,
    check_files,
    read_manifest,
)
from fgpt.engine.base import SavedFile
from fgpt.errors import CheckpointError
from fgpt.utils.files import sha256_file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with two files and their manifest."""
    entries = []
    for name in ("a.pt", "b.pt"):
        path = tmp_path / name
        path.write_bytes(name.encode() * 100)
        entries.append(SavedFile(name, path.stat().st_size, sha256_file(path)))
    config = {"lr": 1e-3, "text": "\u00e9\n", "none": None, "list": [1, 2.5, True]}
    Manifest(7, 28, {"seed": 1}, config, tuple(entries)).write(tmp_path)
    return tmp_path


def test_what_was_written_is_read(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.samples_seen, manifest.identity) == (7, 28, {"seed": 1})
    assert [file.name for file in manifest.files] == ["a.pt", "b.pt"]
    check_files(checkpoint, manifest)


def test_every_flipped_bit_is_noticed(checkpoint: Path) -> None:
    path = checkpoint / FILE
    whole, before = path.read_bytes(), read_manifest(checkpoint)
    for i in range(len(whole)):
        for bit in (1, 16, 128):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])
            try:
                assert read_manifest(checkpoint) == before, (i, bit)  # white space
            except CheckpointError as error:
                assert str(path) in str(error)


def test_every_cut_is_noticed(checkpoint: Path) -> None:
    path = checkpoint / FILE
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=FILE):
            read_manifest(checkpoint)


@pytest.mark.parametrize("text", ["", "null", "3", "[]", "{}", '{"files": []}', "\xff", "[" * 9999])
def test_other_contents_are_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=FILE):
        read_manifest(checkpoint)


def test_another_version_is_refused(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    (checkpoint / FILE).unlink()
    Manifest(**{**vars(manifest), "version": 2}).write(checkpoint)
    with pytest.raises(CheckpointError, match="format version 2, this FGPT reads version 1"):
        read_manifest(checkpoint)


def test_the_seal_is_in_the_file(checkpoint: Path) -> None:
    assert len(json.loads((checkpoint / FILE).read_text())[HASH_KEY]) == 64


def test_each_rank_hashes_a_share_and_all_of_them_everything(checkpoint: Path) -> None:
    data = (checkpoint / "b.pt").read_bytes()
    (checkpoint / "b.pt").write_bytes(data[:-1] + b"!")
    manifest = read_manifest(checkpoint)
    check_files(checkpoint, manifest, share=0, shares=2)
    with pytest.raises(CheckpointError, match=r"b\.pt: its contents have changed"):
        check_files(checkpoint, manifest, share=1, shares=2)


def test_a_link_is_not_followed(checkpoint: Path) -> None:
    (checkpoint / "a.pt").rename(checkpoint.parent / "elsewhere")
    (checkpoint / "a.pt").symlink_to(checkpoint.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=r"a\.pt: not a regular file"):
        check_files(checkpoint, read_manifest(checkpoint))
    with pytest.raises(OSError):
        sha256_file(checkpoint / "a.pt", follow_symlinks=False)


def test_identities_that_differ_name_every_value() -> None:
    saved = {"model.n_layer": 2, "data.seed": 1, "gone": 5}
    current = {"model.n_layer": 4, "data.seed": 1, "new": 6}
    check_identity(saved, dict(saved), "here")
    with pytest.raises(CheckpointError) as caught:
        check_identity(saved, current, "step_1")
    text = str(caught.value)
    assert "model.n_layer: checkpoint 2, this run 4" in text and "data.seed" not in text
    assert (
        "gone: checkpoint 5, this run None" in text and "new: checkpoint None, this run 6" in text
    )


def test_changes_are_listed_by_their_path() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": 1}
    new = {"a": {"b": 2, "c": [1]}, "e": {"f": 1}}
    assert changed_settings(old, new, "run.") == [
        "run.a.b: 1 -> 2",
        "run.d: 1 -> None",
        "run.e: None -> {'f': 1}",
    ]
