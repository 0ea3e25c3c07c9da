"""A proof fails for what is wrong, and says whose fault it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fgpt.cli import main
from fgpt.convert.convert import from_hugging_face
from fgpt.convert.proof import compare_stored, compare_tensors
from fgpt.errors import CheckpointError, TrainingError
from fgpt.inference.hf_weights import HuggingFaceWeights
from fgpt.inference.weights import open_weights
from tests.convert.models import save_random, save_transformers, small_config

pytest.importorskip("transformers")
K = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_transformers(tmp_path / "hf", "llama", tied=False, kv=2)
    return tmp_path / "hf"


def set_value(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("has_transformers", [True, False])
def test_weights_that_are_not_finite(
    llama: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, value: float, has_transformers: bool
) -> None:
    """The stored tensor is named, both ways in and out; nothing is left."""
    if not has_transformers:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    set_value(llama, K, value)
    for way in ("--from", "--to"):
        assert main(["convert", str(llama), way, "hf", "--out", str(llama.parent / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        name = K if way == "--from" else "blocks.1.attention.qkv.weight"
        assert f"{llama}: weight {name} is not finite" in line and "bug" not in line
        assert "--dtype" not in line  # no dtype helps
    assert sorted(path.name for path in llama.parent.iterdir()) == ["hf"]


def test_logits_that_are_not_finite(llama: Path, capsys: Any) -> None:
    for name in ("gate", "up", "down"):
        set_value(llama, f"model.layers.0.mlp.{name}_proj.weight", 1e38)
    argv = ["convert", str(llama), "--from", "hf", "--out", str(llama.parent / "out")]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{llama}: the logits are not finite" in line and "bug" not in line


def test_what_was_written_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nan is no small difference."""
    source = open_weights(save_random(tmp_path / "run", small_config()))
    written = open_weights(save_random(tmp_path / "written", small_config()))
    compare_tensors(source, written, torch.float32).check()
    right = written.read
    monkeypatch.setattr(
        written, "read", lambda n: right(n) * (torch.nan if n.endswith("up.weight") else 1)
    )
    with pytest.raises(TrainingError, match="conversion is wrong"):
        compare_tensors(source, written, torch.float32).check()


def test_stored_tensors_are_read_independently(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in how the import reads its source is found without transformers."""
    out = llama.parent / "out"
    right = HuggingFaceWeights.read
    monkeypatch.setattr(HuggingFaceWeights, "read", lambda self, n: right(self, n).bfloat16())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="conversion is wrong"):
        from_hugging_face(open_weights(llama), out, tokenizer=None, say=lambda _: None)
    monkeypatch.undo()
    from_hugging_face(open_weights(llama), out, tokenizer=None, say=lambda _: None)
    source = HuggingFaceWeights(llama)
    proof = compare_stored(source, open_weights(out))
    proof.check()
    assert proof.text.startswith(f"{len(source.stored)} tensors")


def test_what_transformers_does_not_load(llama: Path, capsys: Any) -> None:
    """Its reason in one line, also where FGPT reads it."""
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1}))
    assert HuggingFaceWeights(llama).config.norm_eps == 1
    argv = ["convert", str(llama), "--from", "hf", "--out", str(llama.parent / "out")]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not load it" in line and "rms_norm_eps" in line
    with pytest.raises(CheckpointError):
        open_weights(llama.parent / "out")
