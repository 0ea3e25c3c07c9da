"""Files of Hugging Face that are odd but right, and those that are refused in a line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fgpt.cli import main
from fgpt.errors import CheckpointError
from fgpt.inference.weights import load_model, load_tokenizer_for, open_weights
from tests.convert.models import save_transformers

transformers = pytest.importorskip("transformers")

WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Q, K, V = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_transformers(tmp_path / "hf", "llama", tied=True, kv=2)
    return tmp_path / "hf"


def change(folder: Path, tensors: Callable[[dict[str, Any]], Any], **config: object) -> None:
    file = folder / WEIGHTS
    changed = load_file(file)
    tensors(changed)
    save_file(changed, file, {"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))


def check_same_logits(folder: Path) -> None:
    ids = torch.arange(32)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
    mine = load_model(open_weights(folder), "cpu", torch.float32)(ids)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", ["equal", "other", "alone"])
def test_a_tied_head_that_is_stored(llama: Path, tmp_path: Path, capsys: Any, head: str) -> None:
    """As in transformers 5: with other values it is not tied, and a line says so; alone it is the
    embedding too.
    """

    def store(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if head == "other":
            tensors[HEAD][404, 31] += 1  # the last one
        elif head == "alone":
            del tensors[EMBEDDING]

    change(llama, store)
    source = open_weights(llama)
    assert source.config.tied_head is (head != "other")
    said = capsys.readouterr().err
    assert said.count("\n") == (head == "other") and ("tie_word_embeddings" in said) == bool(said)
    check_same_logits(llama)
    capsys.readouterr()
    assert main(["convert", str(llama), "--from", "hf", "--out", str(tmp_path / "run")]) == 0
    assert open_weights(tmp_path / "run").config.tied_head is (head != "other")


def test_a_stored_head_of_another_shape(llama: Path) -> None:
    change(llama, lambda tensors: tensors.update({HEAD: torch.ones(7, 32)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[7, 32\]"):
        open_weights(llama)


@pytest.mark.parametrize("order", [(Q, K, V), (K, V, Q), (V, Q, K)])
def test_parts_of_several_dtypes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
) -> None:
    """No value of a wider part is rounded to the dtype of another one, or too large for it."""
    half, brain, full = order

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        tensors[half], tensors[brain] = tensors[half].half(), tensors[brain].bfloat16()
        tensors[brain][0, 0] = 2.0**100
        tensors[full][0, 0] = 1 + 2.0**-20

    change(llama, mix)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["convert", str(llama), "--from", "hf", "--out", str(tmp_path / "run")]) == 0
    stored = load_file(llama / WEIGHTS)
    for source in map(open_weights, (llama, tmp_path / "run")):
        qkv = source.read("blocks.0.attention.qkv.weight").reshape(2, 4, 8, 32)
        q, k, v = qkv[:, :2].reshape(32, 32), qkv[:, 2].reshape(16, 32), qkv[:, 3].reshape(16, 32)
        for name, part in ((Q, q), (K, k), (V, v)):
            assert torch.equal(part.float(), stored[name].float()), name


def test_float64(llama: Path, capsys: Any) -> None:
    """Read as float32, which a line says."""
    change(llama, lambda t: t.update({name: tensor.double() for name, tensor in t.items()}))
    check_same_logits(llama)
    (line,) = capsys.readouterr().err.splitlines()
    assert "float64" in line and "float32" in line and "quantized" not in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized(llama: Path, dtype: torch.dtype) -> None:
    change(llama, lambda tensors: tensors.update({K: tensors[K].to(dtype)}))
    with pytest.raises(CheckpointError, match=r"k_proj.weight is quantized \(.*8"):
        open_weights(llama)


@pytest.mark.parametrize(
    "huge",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**12},
        {"hidden_size": 10**30},
        {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
        {"intermediate_size": 2**62},
        {"head_dim": 2**62},
    ],
)
@pytest.mark.timeout(20)
def test_sizes_that_the_files_do_not_have(llama: Path, huge: dict[str, int]) -> None:
    """Compared before there are tables of them, with the value and the key."""
    change(llama, lambda tensors: None, **huge)
    key, value = next(iter(huge.items()))
    with pytest.raises(CheckpointError, match=f"{key} is {value}"):
        open_weights(llama)


FILES = ("config.json", WEIGHTS, f"{WEIGHTS}.index.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["pipe", "folder", "link to nothing", "link to itself", "device"])
@pytest.mark.timeout(20)
def test_no_regular_file(llama: Path, name: str, what: str) -> None:
    """Refused by the name in the directory, and not waited for."""
    file = llama / name
    file.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    else:
        targets = {"link to nothing": "../blobs/1", "link to itself": name, "device": "/dev/zero"}
        file.symlink_to(targets[what])
    said = {"link to nothing": r"is a link to \.\./blobs/1, which does not exist"}
    said |= {"link to itself": "Too many levels of symbolic links"}
    with pytest.raises(CheckpointError, match=said.get(what, "not a regular file")) as error:
        open_weights(llama)
    assert str(error.value).startswith(f"{file}: ")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "x.model"])
@pytest.mark.timeout(20)
def test_a_tokenizer_that_is_a_pipe(llama: Path, name: str) -> None:
    (llama / "tokenizer.json").write_text("{}")
    (llama / name).unlink(missing_ok=True)
    os.mkfifo(llama / name)
    with pytest.raises(CheckpointError, match=rf"{name}: .* file"):
        load_tokenizer_for(open_weights(llama))


def test_links(llama: Path, tmp_path: Path) -> None:
    """Followed, also to a file whose contents are wrong: the link is named."""
    for file in list(llama.iterdir()):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    check_same_logits(llama)
    (tmp_path / "blobs" / WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="no safetensors file") as error:
        open_weights(llama)
    assert str(error.value).startswith(f"{llama / WEIGHTS}: ") and "blobs" not in str(error.value)


def test_byte_order_mark(llama: Path, tmp_path: Path, capsys: Any) -> None:
    """transformers cannot read it; the logits are compared all the same."""
    file = llama / "config.json"
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert main(["convert", str(llama), "--from", "hf", "--out", str(tmp_path / "run")]) == 0
    assert "logits of 32 tokens" in capsys.readouterr().out


def test_a_path_that_is_not_utf8(llama: Path, tmp_path: Path) -> None:
    llama.rename(tmp_path / os.fsdecode(b"\xff"))
    with pytest.raises(CheckpointError, match="is not UTF-8.*rename"):
        open_weights(tmp_path / os.fsdecode(b"\xff"))


def test_facts_that_are_none(llama: Path) -> None:
    """What FGPT would not have written is not believed, nor printed in a model card."""
    bad = {"step": -1, "tokens": True, "valid_loss": 10**400, "base_model": "a\nlicense: mit"}
    change(llama, lambda tensors: None, fgpt=bad | {"origin": "x"})
    facts = open_weights(llama).facts
    assert (facts.step, facts.tokens, facts.valid_loss) == (None, None, None)
    assert (facts.base_model, facts.origin) == ("", "x")
