"""Hugging Face -> FGPT: the same logits as transformers, and back the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fgpt.cli import main
from fgpt.errors import CheckpointError
from fgpt.inference.weights import load_model, open_weights
from tests.convert.models import save_random, save_transformers, small_config

transformers = pytest.importorskip("transformers")

CASES: list[tuple[str, bool, int, dict[str, Any]]] = [
    *(("gpt2", tied, 4, {}) for tied in (True, False)),
    *(("llama", tied, kv, {}) for tied in (True, False) for kv in (1, 2, 4)),
    ("llama", True, 2, {"attention_bias": True, "mlp_bias": True}),
    ("llama", False, 4, {"head_dim": 24}),
    *(("qwen3", tied, kv, {}) for tied, kv in ((True, 1), (False, 2), (False, 4))),
    ("qwen3", True, 2, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
]


@pytest.mark.parametrize(("kind", "tied", "kv", "more"), CASES)
def test_there_and_back(
    tmp_path: Path, capsys: Any, kind: str, tied: bool, kv: int, more: dict[str, Any]
) -> None:
    theirs = save_transformers(tmp_path / "hf", kind, tied=tied, kv=kv, **more)
    run, back = tmp_path / "run", tmp_path / "back"
    assert main(["convert", str(tmp_path / "hf"), "--from", "hf", "--out", str(run)]) == 0
    ids = torch.randint(405, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.abs().max() > 0.5
    for path in (tmp_path / "hf", run):
        model = load_model(open_weights(path), "cpu", torch.float32)
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
    assert main(["convert", str(run), "--to", "hf", "--out", str(back)]) == 0
    first, second = (load_file(p / "model.safetensors") for p in (tmp_path / "hf", back))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.numpy().tobytes() == second[name].numpy().tobytes(), name
    capsys.readouterr()
    assert main(["checkpoint", "inspect", str(run)]) == 0
    assert main(["checkpoint", "verify", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "weights only" in shown and f"imported from {tmp_path / 'hf'}" in shown


def test_as_published(tmp_path: Path) -> None:
    """GPT-2's own file has no prefix, and the buffers of older versions; n_inner is null."""
    theirs = save_transformers(tmp_path, "gpt2", tied=True)
    file = tmp_path / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    save_file(tensors, file, {"format": "pt"})
    model = load_model(open_weights(tmp_path), "cpu", torch.float32)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    """Its files are links; the model's name there is kept until the model card."""
    cached = tmp_path / "models--some-owner--a_Model-1.5" / "snapshots" / "0123"
    save_transformers(tmp_path / "blobs", "gpt2", tied=True)
    cached.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (cached / file.name).symlink_to(file)
    source = open_weights(cached)
    assert source.read("final_norm.weight").shape == (32,)
    run, back, again = (tmp_path / name for name in ("run", "back", "again"))
    assert main(["convert", str(cached), "--from", "hf", "--out", str(run)]) == 0
    for path, out in ((run, back), (back, again)):
        assert main(["convert", str(path), "--to", "hf", "--out", str(out)]) == 0
        card = (out / "README.md").read_text()
        assert '\nbase_model: "some-owner/a_Model-1.5"\n' in card.partition("---\n\n")[0]
        assert "converted by FGPT" in card and "trained with" not in card and "0 steps" not in card
        assert f"began with the weights 0123 (sha256 {source.fingerprint()[:12]})" in card
        assert str(tmp_path) not in card + (out / "config.json").read_text()


def test_fingerprint(tmp_path: Path) -> None:
    """Of the same model with other weights it is another one."""
    save_transformers(tmp_path / "a", "gpt2", tied=True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = open_weights(tmp_path / "a").fingerprint()
    assert open_weights(tmp_path / "b").fingerprint() == first
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["transformer.ln_f.weight"] += 1
    save_file(tensors, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    assert open_weights(tmp_path / "b").fingerprint() != first


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "quantization_config", {"bits": 4}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0}),
        ("llama", "attention_bias", True),
        ("llama", "partial_rotary_factor", 0.5),
        ("qwen3", "use_sliding_window", True),
        ("qwen3", "attention_bias", True),
        ("llama", "model_type", "mamba"),
        ("llama", "hidden_size", "32"),
        ("llama", "head_dim", 16),
        ("llama", "num_hidden_layers", 1),
        ("llama", "num_hidden_layers", 3),
    ],
)
def test_other_options_are_refused(
    tmp_path: Path, capsys: Any, kind: str, key: str, value: object
) -> None:
    folder = tmp_path / "hf"
    save_transformers(folder, kind, tied=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    assert main(["convert", str(folder), "--from", "hf", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    named = {"num_hidden_layers": "model.layers.", "head_dim": "_proj.weight"}.get(key, key)
    assert named in line, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def damage(folder: Path, what: str) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    if what == "pickle":
        file.rename(folder / "pytorch_model.bin")
    elif what == "cut":
        file.write_bytes(data[:-100])
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "no JSON":
        (folder / "config.json").write_text("{")
    elif what == "another tensor":
        save_file(load_file(file) | {"lora_A": torch.ones(2)}, file)
    elif what == "integers":
        tensors = load_file(file)
        save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, file)
    elif what == "a missing shard":
        places = {name: "model-00001-of-00001.safetensors" for name in load_file(file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    elif what == "a path":
        places = {name: "../hf/model.safetensors" for name in load_file(file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("pickle", "save_pretrained"),
        ("cut", "no safetensors file"),
        ("no config", "has no weights"),
        ("no JSON", "no JSON"),
        ("another tensor", "lora_A"),
        ("integers", "quantized"),
        ("a missing shard", "missing"),
        ("a path", "weight_map"),
    ],
)
def test_damage(tmp_path: Path, what: str, said: str) -> None:
    save_transformers(tmp_path, "gpt2", tied=True)
    damage(tmp_path, what)
    with pytest.raises(CheckpointError, match=said) as error:
        open_weights(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_source(tmp_path: Path, capsys: Any) -> None:
    run = save_random(tmp_path / "run", small_config())
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to("gone")
    for name, said in (
        ("missing", "does not exist"),
        ("file", "is a file"),
        ("link", "is a link to gone, which does not exist"),
        ("empty", "has no weights"),
        ("begun", "no checkpoint yet"),
        ("run/checkpoints/step_00000009", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=said):
            open_weights(tmp_path / name)
    assert open_weights(run / "checkpoints" / "step_00000003").facts.step == 3
    assert main(["convert", str(run), "--from", "hf", "--out", str(tmp_path / "out")]) == 2
    assert "FGPT's own already" in capsys.readouterr().err
