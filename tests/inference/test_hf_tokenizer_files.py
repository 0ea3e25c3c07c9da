"""The ids of a text are those that transformers gives, with what it puts in front."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fgpt.cli import main
from fgpt.errors import DataError
from fgpt.inference.hf_tokenizer_files import load_hugging_face_tokenizer
from fgpt.inference.weights import load_tokenizer_for, open_weights
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.load import load_copy, load_tokenizer, save_copy
from fgpt.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from tests.convert.models import save_random, save_transformers, small_config

transformers = pytest.importorskip("transformers")

TEXT = "def f(x):\n    return 'Größe </s> <s>'  # hello world\n"
BOS, EOS = "<s>", "</s>"


def save_tokenizer(folder: Path, kind: str) -> None:
    """Save a byte-level BPE as transformers does; a "llama" has a BOS in its post-processor."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", BOS, EOS]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    if kind == "llama":
        template = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
        )
        level = processors.ByteLevel(trim_offsets=False)
        backend.post_processor = processors.Sequence([level, template])
    elif kind == "gpt2":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token="<unk>"
    )
    theirs.save_pretrained(folder)


def check_same_ids(mine: Tokenizer, folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, "x"):
        assert mine.encode_prompt(text) == theirs(text)["input_ids"]
        assert mine.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("kind", "prefix"), [("llama", (1,)), ("gpt2", ()), ("none", ())])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_ids(tmp_path: Path, kind: str, prefix: tuple[int, ...], add_bos_token: bool) -> None:
    """A tokenizer.json decides, not add_bos_token; an empty prompt has an id."""
    save_tokenizer(tmp_path, kind)
    if add_bos_token is not None:
        file = tmp_path / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {"add_bos_token": add_bos_token}
        file.write_text(json.dumps(settings))
    mine = load_hugging_face_tokenizer(tmp_path)
    assert mine.prompt_prefix == prefix and (mine.eod, mine.eod_id) == (EOS, 2)
    check_same_ids(mine, tmp_path)
    assert mine.encode_prompt("") == list(prefix or (2,))
    # a copy keeps it; the file alone, from which data is prepared, has none
    save_copy(mine, tmp_path / "copy")
    assert load_copy(tmp_path / "copy").prompt_prefix == prefix
    assert load_tokenizer(tmp_path / "tokenizer.json", eod=EOS).prompt_prefix == ()


def test_there_and_back(tmp_path: Path, capsys: Any) -> None:
    """An imported Llama keeps its BOS, and its export."""
    save_transformers(tmp_path / "hf", "llama", tied=False)
    save_tokenizer(tmp_path / "hf", "llama")
    run, back = tmp_path / "run", tmp_path / "back"
    assert main(["convert", str(tmp_path / "hf"), "--from", "hf", "--out", str(run)]) == 0
    assert load_tokenizer_for(open_weights(run)).prompt_prefix == (1,)
    assert main(["convert", str(run), "--to", "hf", "--out", str(back)]) == 0
    assert "warning" not in capsys.readouterr().out
    check_same_ids(load_tokenizer_for(open_weights(back)), back)
    assert load_tokenizer_for(open_weights(run), tmp_path / "hf").prompt_prefix == (1,)
    for folder, name in ((tmp_path / "hf", "tokenizer.json"), (back, "tokenizer.json")):
        assert "TemplateProcessing" in (folder / name).read_text()
    config = json.loads((back / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_a_model_trained_without_bos(tmp_path: Path, capsys: Any) -> None:
    """Its export has none either, although the tokenizer's file has one."""
    save_tokenizer(tmp_path / "hf", "llama")
    own = load_tokenizer(tmp_path / "hf" / "tokenizer.json", eod=EOS)
    run, out = save_random(tmp_path / "run", small_config()), tmp_path / "out"
    save_copy(own, run / "tokenizer")
    assert main(["convert", str(run), "--to", "hf", "--out", str(out)]) == 0
    assert "warning" not in capsys.readouterr().out
    mine = load_tokenizer_for(open_weights(out))
    assert mine.prompt_prefix == () and mine.encode(TEXT) == own.encode(TEXT)
    check_same_ids(mine, out)


@pytest.fixture(scope="module")
def piece() -> Tokenizer:
    return train_tokenizer(TokenizerSpec(400, kind="sentencepiece-bpe"), [TEXT * 20])


@pytest.mark.parametrize(
    ("settings", "has_bos"),
    [
        (None, True),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"tokenizer_class": "T5Tokenizer"}, False),
        ({"tokenizer_class": "T5Tokenizer", "add_bos_token": True}, True),
    ],
)
def test_sentencepiece_alone(
    tmp_path: Path, piece: Tokenizer, settings: dict[str, Any] | None, has_bos: bool
) -> None:
    """Llama's has a BOS by default; one that the model lacks is refused by name."""
    (tmp_path / "tokenizer.model").write_bytes(piece.raw)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    name = {"bos_token": {"content": piece.eod}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps((settings or {}) | name))
    prefix = (piece.eod_id,) if has_bos else ()
    mine = load_hugging_face_tokenizer(tmp_path)
    assert isinstance(mine, SentencePieceTokenizer) and mine.prompt_prefix == prefix
    lacking = json.dumps((settings or {}) | {"bos_token": "<none>"})
    (tmp_path / "tokenizer_config.json").write_text(lacking)
    if has_bos:
        with pytest.raises(DataError, match=r"no <none>.*add_bos_token"):
            load_hugging_face_tokenizer(tmp_path)


def test_export_of_sentencepiece(tmp_path: Path, piece: Tokenizer, capsys: Any) -> None:
    """The tokenizer.json that goes along has the BOS too."""
    run, out = save_random(tmp_path / "run", small_config()), tmp_path / "out"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer.model").write_bytes(piece.raw)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": piece.eod}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(settings))
    own = load_hugging_face_tokenizer(tmp_path / "own")
    save_copy(own, run / "tokenizer")
    assert main(["convert", str(run), "--to", "hf", "--out", str(out)]) == 0
    assert "warning" not in capsys.readouterr().out
    mine = load_tokenizer_for(open_weights(out))
    assert mine.kind == "sentencepiece-bpe" and mine.prompt_prefix == (piece.eod_id,)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs("def f(x)")["input_ids"] == mine.encode_prompt("def f(x)")
