"""Loading: invalid and harmful files are refused in one line that names them."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fgpt.errors import DataError
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.load import load_tokenizer
from fgpt.tokenizer.spec import EOD, TokenizerSpec, spec_issues
from fgpt.tokenizer.train import train_tokenizer
from tests.prepare.corpora import run_python
from tests.tokenizer.chinese import MIXED, documents

TEXTS = ["def f(x):\n    return x\n", "hello world " * 20, *documents(5)]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TokenizerSpec(400), TEXTS)


@pytest.fixture(scope="module")
def piece() -> Tokenizer:
    return train_tokenizer(TokenizerSpec(400, kind="sentencepiece-bpe"), TEXTS)


class Canary:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("canary"),))


def invalid_files(bpe: Tokenizer, piece: Tokenizer) -> dict[str, tuple[bytes, str]]:
    return {
        "tokenizer.json": (bpe.raw[: len(bpe.raw) // 2], "not a tokenizer.json"),
        "empty.json": (b"", "not a tokenizer.json"),
        "object.json": (b"{}", "not a tokenizer.json"),
        "list.json": (b"[1, 2]", "not a tokenizer.json"),
        "vocab.json": (b'{"a": 0, "b": 1}', "not a tokenizer.json"),
        "pickle.json": (pickle.dumps(Canary()), "a pickle, which is never loaded"),
        "pickle.model": (pickle.dumps(Canary()), "a pickle, which is never loaded"),
        "merges.txt": (b"#version: 0.2\na b\n", "not a SentencePiece model"),
        "empty.model": (b"", "not a SentencePiece model .no pieces"),
        "cut.model": (
            piece.raw[:1000],
            "not a SentencePiece model .its protobuf is damaged or truncated",
        ),
        "noise.model": (bytes(range(8, 256)), "not a SentencePiece model"),
        "tiktoken.model": (b"IQ== 0\nIg== 1\n", "a tiktoken file"),
    }


def test_invalid_files(
    bpe: Tokenizer, piece: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (raw, message) in invalid_files(bpe, piece).items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=f"{name}: {message}") as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value), name
    assert not Path("canary").exists()
    with pytest.raises(DataError, match="nothing.json: no such file"):
        load_tokenizer(tmp_path / "nothing.json")


def test_a_directory_with_none_one_or_two(bpe: Tokenizer, piece: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no tokenizer"):
        load_tokenizer(tmp_path)
    piece.save(tmp_path / "spiece.model")
    assert load_tokenizer(tmp_path).fingerprint == piece.fingerprint
    bpe.save(tmp_path)
    with pytest.raises(DataError, match=r"more than one .*tokenizer.json, spiece.model.*name the"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == bpe.fingerprint


def gpt2_files(bpe: Tokenizer, folder: Path, vocabulary: str, merges: str) -> None:
    model = json.loads(bpe.raw)["model"]
    (folder / vocabulary).write_text(json.dumps(model["vocab"]))
    lines = [" ".join(pair) for pair in model["merges"]]
    (folder / merges).write_text("\n".join(["#version: 0.2", *lines]) + "\n")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_files(bpe: Tokenizer, tmp_path: Path, names: tuple[str, str]) -> None:
    gpt2_files(bpe, tmp_path, *names)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eod_id, loaded.vocab_size) == (bpe.eod_id, bpe.vocab_size)
    for text in (*TEXTS, *MIXED, f"a{EOD}b"):
        assert loaded.encode(text) == bpe.encode(text)
    again = tmp_path / "saved"
    again.mkdir()
    loaded.save(again)
    assert load_tokenizer(again).fingerprint == loaded.fingerprint
    (tmp_path / names[1]).unlink()
    with pytest.raises(DataError, match="vocab.json needs merges.txt beside it"):
        load_tokenizer(tmp_path)


def test_broken_gpt2_files(bpe: Tokenizer, tmp_path: Path) -> None:
    gpt2_files(bpe, tmp_path, "vocab.json", "merges.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0')
    with pytest.raises(DataError, match=r"vocab.json and merges.txt: "):
        load_tokenizer(tmp_path)


def edited(tokenizer: Tokenizer, file: Path, **settings: object) -> Path:
    file.write_text(json.dumps(json.loads(tokenizer.raw) | settings))
    return file


def test_dropout_is_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    model = json.loads(bpe.raw)["model"] | {"dropout": 0.1}
    with pytest.raises(DataError, match="model.dropout is 0.1: encoding would be random"):
        load_tokenizer(edited(bpe, tmp_path / "t.json", model=model))


def test_usual_names_of_the_eod_token(bpe: Tokenizer, tmp_path: Path) -> None:
    for name in ("</s>", "<|end_of_text|>", "<eos>"):
        file = tmp_path / "t.json"
        file.write_text(bpe.raw.decode().replace(EOD, name))
        loaded = load_tokenizer(file)
        assert (loaded.eod, loaded.eod_id) == (name, bpe.eod_id)
        assert bpe.eod_id not in loaded.encode(f"a{name}")
    file.write_text(bpe.raw.decode().replace(EOD, "<finis>"))
    with pytest.raises(DataError, match=r'has no "<.endoftext.>" or "</s>" or .*tokenizer.eod'):
        load_tokenizer(file)
    assert load_tokenizer(file, eod="<finis>").eod_id == bpe.eod_id
    with pytest.raises(DataError, match='has no "<end>" token'):
        load_tokenizer(file, eod="<end>")


def unigram(file: Path, *special: str) -> Path:
    """Write a tokenizer.json whose model encodes "</s>" in a text as its piece </s>."""
    letters = [(character, -2.0) for character in "abc<>/s"]
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    backend.decoder = decoders.Fuse()
    backend.save(str(file))
    return file


def test_a_piece_that_is_a_special_token_is_text_in_a_text(tmp_path: Path) -> None:
    path = unigram(tmp_path / "u.json", "</s>")
    library = Backend.from_file(str(path))
    library.encode_special_tokens = True
    assert 1 in library.encode("a</s>").ids  # the library's own behavior
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("a</s>b</s>")
    assert tokenizer.eod_id == 1 and 1 not in ids
    assert tokenizer.decode(ids) == "a</s>b</s>"
    assert load_tokenizer(path, "control").encode("a</s>").count(1) == 1


def test_a_name_that_cannot_be_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    model = models.WordLevel({"[unk]": 0, "x": 1}, unk_token="[unk]")
    backend = Backend(model)
    backend.normalizer = normalizers.Replace("nd", "x")
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(file))
    with pytest.raises(DataError, match=r'"x" in a document would become that special token'):
        load_tokenizer(file, eod="x")
    assert load_tokenizer(file, "control", "x").eod_id == 1


@pytest.mark.parametrize(
    "spec, message",
    [
        (TokenizerSpec(12), r'vocab_size" is 12; at least 257'),
        (TokenizerSpec(259, kind="sentencepiece-bpe"), "at least 260"),
        (TokenizerSpec(path="t", kind="sentencepiece-bpe"), 'kind" .* has no effect'),
        (TokenizerSpec(path="t", sample_mb=5), 'sample_mb" .* has no effect'),
        (TokenizerSpec(sample_mb=0), 'sample_mb" is 0; 1 or more'),
        (TokenizerSpec(eod=""), "eod\" is ''; null or a name without blanks"),
        (TokenizerSpec(eod="a b"), "eod\" is 'a b'"),
    ],
)
def test_invalid_specs(spec: TokenizerSpec, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(spec, TEXTS)
    assert not spec_issues(TokenizerSpec(path="t", special_tokens="control", eod="</s>"))


# Flips bytes of a model and encodes with those that load; a crash of the library ends this process.
FUZZ = """
import random, sys
from pathlib import Path
from fgpt.tokenizer.load import tokenizer_from_bytes
from fgpt.errors import DataError
raw, name, draw = Path(sys.argv[1]).read_bytes(), sys.argv[2], random.Random(int(sys.argv[3]))
refused = 0
for _ in range(150):
    data = bytearray(raw)
    for _ in range(draw.choice((1, 3, 20))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    if draw.random() < 0.2:
        del data[draw.randrange(len(data)):]
    try:
        tokenizer = tokenizer_from_bytes(bytes(data), name, name)
        tokenizer.decode(tokenizer.encode("def f(x): \\u6211\\u4eec <|endoftext|>"))
    except DataError as error:
        assert len(str(error).splitlines()) == 1, error
        refused += 1
print("refused", refused)
"""


def test_damaged_files_are_refused_or_work(
    bpe: Tokenizer, piece: Tokenizer, tmp_path: Path
) -> None:
    for tokenizer in (bpe, piece):
        tokenizer.save(tmp_path)
        file, seed = tmp_path / tokenizer.file_name, random.Random(5).randrange(1000)
        done = run_python(FUZZ, file, file.name, seed)
        assert done.returncode == 0, done.stderr[-600:]
        assert int(done.stdout.split()[1]) > 20


IMPORTED = """
import sys, fgpt.tokenizer.load
print(sorted(name for name in sys.modules if name.startswith("fgpt.tokenizer")))
print([name for name in ("sentencepiece", "google.protobuf", "gigatoken") if name in sys.modules])
"""


def test_loading_imports_no_encoder_and_no_training() -> None:
    """A training run loads a tokenizer only to decode a sample."""
    modules = ["", ".base", ".hf_tokenizer", ".load", ".spec"]
    expected = f"{[f'fgpt.tokenizer{name}' for name in modules]}\n[]\n"
    assert run_python(IMPORTED).stdout == expected


def test_a_special_token_comes_before_a_learnt_piece(bpe: Tokenizer, tmp_path: Path) -> None:
    """EOD stays in the vocabulary as a piece; the file declares </s>."""
    tree = json.loads(bpe.raw)
    special = tree["added_tokens"][0]
    tree["added_tokens"] = [{**special, "id": 300, "content": "</s>"}]
    file = tmp_path / "t.json"
    file.write_text(json.dumps(tree))
    loaded = load_tokenizer(file)
    assert loaded.eod == "</s>" and loaded.eod_id != bpe.eod_id
    assert load_tokenizer(file, eod=EOD).eod_id == bpe.eod_id
