"""Byte-level BPE: lossless, special tokens in text stay text, training is reproducible."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgpt.data.token_dataset import TokenDataset
from fgpt.errors import DataError
from fgpt.tokenizer.base import Tokenizer, split_text
from fgpt.tokenizer.load import load_tokenizer
from fgpt.tokenizer.spec import EOD, TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from tests.prepare.corpora import run_python

TEXTS = [
    "def f(x):\n    return x\n",
    "hello world " * 20,
    "\u4e2d\u6587 caf\u00e9",
    f"{EOD} is text",
]


def train(texts: list[str], vocab_size: int) -> Tokenizer:
    return train_tokenizer(TokenizerSpec(vocab_size), texts)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS * 5, 300)


# Surrogates are not text: UTF-8 has no bytes for them.
anything = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    "<|endoftx>\n \r\ta\u0301", max_size=40
)


def test_round_trip_of_any_text(tokenizer: Tokenizer) -> None:
    @settings(deadline=None)
    @given(st.lists(anything, min_size=1, max_size=4))
    def check(texts: list[str]) -> None:
        encoded = tokenizer.encode_batch(texts)
        assert [tokenizer.decode(ids) for ids in encoded] == texts
        for ids in encoded:
            assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
            assert tokenizer.eod_id not in ids

    check()


def test_eod_in_a_text_is_data(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{EOD}b")
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == f"a{EOD}b"
    assert tokenizer.decode([tokenizer.eod_id]) == EOD


def test_eod_in_a_text_is_data_after_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(f"a{EOD}b") == tokenizer.encode(f"a{EOD}b")


def test_truncation_and_padding_of_a_file_are_ignored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    value = json.loads(file.read_bytes())
    value["truncation"] = {
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    value["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": EOD,
    }
    file.write_text(json.dumps(value))
    assert load_tokenizer(file).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_vocabulary_is_no_larger_than_requested(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 300
    assert train(["ab"], 5000).vocab_size == 258
    with pytest.raises(DataError, match='vocab_size" is 256; at least 257'):
        train(["ab"], 256)


def test_special_token_absent(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace(EOD, "<|other|>"))
    with pytest.raises(DataError, match="has no .*endoftext"):
        load_tokenizer(file)


def test_decode_refuses_ids_out_of_range(tokenizer: Tokenizer) -> None:
    for bad in (-1, 300, 70000, 2**40):
        with pytest.raises(DataError, match=f"id {bad} is outside"):
            tokenizer.decode([1, bad])
    assert tokenizer.decode(np.array([], dtype=np.int64)) == ""


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        tokenizer.encode("a\ud800")


def test_chunks_are_whole_characters() -> None:
    text = ("".join(TEXTS) * 3).encode()
    chunks = list(split_text(text, 7))
    assert b"".join(chunks) == text
    assert "".join(chunk.decode() for chunk in chunks) == text.decode()
    assert 4 <= min(map(len, chunks[:-1])) and max(map(len, chunks)) == 7


@pytest.mark.parametrize("run", ["=", " ", "\n", "\U0001f600", "_", "=-", "a\u0301", "e\u0301"])
def test_a_long_run_of_anything_does_not_slow_training(run: str) -> None:
    """Minutes, were it one word for the trainer; here the test would run into its limit."""
    text = "hello world " * 9 + run * 400_000 + " the end"
    tokenizer = train_tokenizer(TokenizerSpec(vocab_size=300), [text])
    assert tokenizer.decode(tokenizer.encode(run * 50)) == run * 50
    assert "hello" in " ".join(map(tokenizer.id_to_token, range(tokenizer.vocab_size)))


def test_a_very_long_word_does_not_slow_training() -> None:
    # Without the limit this takes minutes: one word of 3 MB, scanned once per merge.
    tokenizer = train([*TEXTS, "abc" * 1_000_000], 400)
    assert tokenizer.decode(tokenizer.encode("abc" * 1000)) == "abc" * 1000


TRAIN = """
import sys, pathlib
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
files = sorted(pathlib.Path(sys.argv[1]).glob("*.txt"))
print(train_tokenizer(TokenizerSpec(600), (f.read_text() for f in files)).fingerprint)
"""


def test_training_does_not_depend_on_threads_or_hash_seeds(corpus: Path) -> None:
    environments = [
        {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
        {"RAYON_NUM_THREADS": "2", "PYTHONHASHSEED": "2"},
        {"RAYON_NUM_THREADS": "5", "PYTHONHASHSEED": "3"},
        {"TOKENIZERS_PARALLELISM": "false"},
    ]
    results = {run_python(TRAIN, corpus, **env).stdout for env in environments}
    assert len(results) == 1
    assert len(results.pop().strip()) == 64


def test_special_ids_of_the_prepared_set(prepared: TokenDataset) -> None:
    assert prepared.card.tokenizer.eod_id == prepared.tokenizer.eod_id
    first = prepared.train.document(0)
    assert first[-1] == prepared.tokenizer.eod_id
    assert prepared.tokenizer.eod_id not in first[:-1]
