"""The manifest, byte by byte, and the identity of a run; without ranks."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fgpt.checkpoint.boxes import Box
from fgpt.checkpoint.identity import changed_settings, check_identity
from fgpt.checkpoint.manifest import (
    FILE,
    HASH_KEY,
    Manifest,
    Start,
    check_file,
    check_names,
    manifest_hash,
    read_manifest,
)
from fgpt.checkpoint.tensor_file import SavedBox, SavedFile, TensorRecord
from fgpt.engine.state import WEIGHT, Progress
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
    record = TensorRecord(
        (2, 3), {WEIGHT: "F32", "exp_avg": "F32"}, [SavedBox(0, Box((0, 0), (2, 3)))]
    )
    Manifest(
        progress=Progress(7, 1, 6, {"cur_scale": 2.0}),
        samples_seen=28,
        tokens_seen=900,
        identity={"seed": 1},
        config=config,
        optimizer="AdamW",
        history=(Start(0, 0, {"ranks": 2}),),
        files=tuple(entries),
        tensors={"w": record},
    ).write(tmp_path)
    return tmp_path


def test_what_was_written_is_read(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.samples_seen, manifest.identity) == (7, 28, {"seed": 1})
    assert [file.name for file in manifest.files] == ["a.pt", "b.pt"]
    assert manifest.states == ["exp_avg"] and manifest.tensors["w"].shape == (2, 3)
    assert manifest.progress == Progress(7, 1, 6, {"cur_scale": 2.0})
    check_names(checkpoint, manifest.files)
    for file in manifest.files:
        check_file(checkpoint, file)


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


def of_tensor(shape: Any, *boxes: Any, **states: str) -> dict[str, Any]:
    return {"w": {"shape": shape, "states": states or {WEIGHT: "F32"}, "boxes": boxes}}


WRONG: list[tuple[str, Any]] = [
    ("progress", {"step": "7"}),
    ("samples_seen", 2.5),
    ("tokens_seen", None),
    ("identity", []),
    ("optimizer", 3),
    ("history", [{"step": 0, "tokens": 0, "layout": {}, "changes": [1]}]),
    ("files", [{"name": "a.pt", "size_bytes": True, "sha256": ""}]),
    ("valid_loss", "low"),
    ("is_permanent", 1),
    ("more", 1),
    ("tensors", of_tensor([2, -3])),
    ("tensors", of_tensor([2, 3], [0, [0, 0], [2, "3"], 0])),
    ("tensors", of_tensor([2, 3], [0, [0, 0]])),
    ("tensors", of_tensor([2, 3], 5)),
    ("progress", {"step": -7}),
    ("progress", {"step": 7, "skipped_steps": -1}),
    ("tokens_seen", -900),
    ("valid_loss", math.nan),
    ("history", []),
    ("files", [{"name": "../a.pt", "size_bytes": 1, "sha256": ""}]),
    ("tensors", {}),
    ("tensors", of_tensor([2, 3], exp_avg="F32")),
    ("tensors", of_tensor([2, 3], weight="F64")),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_values_that_no_save_writes_are_refused(checkpoint: Path, name: str, value: Any) -> None:
    """Even if the hash is right: no other code has to expect them."""
    values = json.loads((checkpoint / FILE).read_text()) | {name: value}
    del values[HASH_KEY]
    (checkpoint / FILE).write_text(json.dumps(values | {HASH_KEY: manifest_hash(values)}))
    with pytest.raises(CheckpointError, match=f"{FILE}: damaged: ") as error:
        read_manifest(checkpoint)
    assert "\n" not in str(error.value)


def test_what_is_no_regular_file_is_not_read(checkpoint: Path) -> None:
    """A pipe would block, a device never end."""
    path = checkpoint / FILE
    path.rename(checkpoint / "moved")
    for make in (os.mkfifo, lambda p: p.symlink_to(checkpoint / "moved"), Path.mkdir):
        make(path)
        with pytest.raises(CheckpointError, match=f"{FILE}: .*not a regular file"):
            read_manifest(checkpoint)
        path.rmdir() if path.is_dir() else path.unlink()


def test_another_version_is_refused(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    (checkpoint / FILE).unlink()
    replace(manifest, version=3).write(checkpoint)
    with pytest.raises(CheckpointError, match="format version 3, this FGPT reads version 2"):
        read_manifest(checkpoint)


def test_the_earlier_format_names_its_converter(checkpoint: Path) -> None:
    values = {"version": 1, "step": 3, "files": []}
    (checkpoint / FILE).write_text(json.dumps(values | {HASH_KEY: manifest_hash(values)}))
    with pytest.raises(CheckpointError, match=f"fgpt checkpoint upgrade {checkpoint}"):
        read_manifest(checkpoint)


def test_the_seal_is_in_the_file(checkpoint: Path) -> None:
    assert len(json.loads((checkpoint / FILE).read_text())[HASH_KEY]) == 64


def test_another_byte_is_noticed(checkpoint: Path) -> None:
    data = (checkpoint / "b.pt").read_bytes()
    (checkpoint / "b.pt").write_bytes(data[:-1] + b"!")
    first, second = read_manifest(checkpoint).files
    check_file(checkpoint, first)
    with pytest.raises(CheckpointError, match=r"b\.pt: its contents have changed"):
        check_file(checkpoint, second)


def test_a_link_is_not_followed(checkpoint: Path) -> None:
    (checkpoint / "a.pt").rename(checkpoint.parent / "elsewhere")
    (checkpoint / "a.pt").symlink_to(checkpoint.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=r"a\.pt: not a regular file"):
        check_file(checkpoint, read_manifest(checkpoint).files[0])
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
