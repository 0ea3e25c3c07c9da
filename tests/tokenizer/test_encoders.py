"""A fast encoder has the library's ids or is not used; both split long texts alike."""

from __future__ import annotations

import itertools
import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer as Backend

from fgpt.errors import DataError
from fgpt.tokenizer import gigatoken_encoder
from fgpt.tokenizer.base import MAX_CHUNK_BYTES, Tokenizer, split_ids, split_text
from fgpt.tokenizer.encoders import EncoderSpec, choose_encoder, find_mismatch
from fgpt.tokenizer.errors import FastEncoderUnavailable
from fgpt.tokenizer.load import load_tokenizer, tokenizer_from_bytes
from fgpt.tokenizer.spec import EOD, Kind, SpecialTokens, TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from tests.tokenizer.chinese import documents
from tests.tokenizer.variants import FAST, TEXTS, VARIANTS

pytest.importorskip("gigatoken", reason="pip install 'fgpt[fast]'")

KINDS: tuple[Kind, ...] = ("bpe", "sentencepiece-bpe", "sentencepiece-unigram")
ALPHABET = [
    *" \t\n\r'\u2019.,;:!?-_=+*/()[]<>|0123456789abcdefgsxyABCDXYZ\u00e9\u00df\u03b1\u0436\u0645",
    *"\u4e2d\u6587\u3002\U00020bb7\U0001f600\u200d\u0301\u0308\u00a0\u3000\u2028\u0085\u1160\u2581",
    *("'s", "'ll", " the", "\r\n", "    ", "class", "Hello", "world", "<|im_end|>", EOD, "abc"),
]


def noise(count: int, seed: int) -> list[str]:
    """Return random texts of characters that tokenizers treat specially, and of any characters."""
    draw = random.Random(seed)
    points = [i for i in range(1, 0x110000) if not 0xD800 <= i < 0xE000]

    def one() -> str:
        pool = draw.choice([ALPHABET, [*ALPHABET, *map(chr, draw.choices(points, k=30))]])
        return "".join(draw.choices(pool, k=draw.choice([1, 3, 10, 50, 200])))

    return [one() for _ in range(count)]


SAMPLE = [text.encode() for text in [*TEXTS, *noise(300, seed=1)]]
OTHERS = [*documents(5, seed=9), *noise(1500, seed=2)]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(TokenizerSpec(500, kind=request.param), TEXTS)


def listed(spec: EncoderSpec, texts: list[str]) -> list[list[int]]:
    ids, lengths = spec.build().encode([text.encode() for text in texts])
    assert ids.dtype == np.uint32 and lengths.dtype == np.int64
    assert len(lengths) == len(texts) and lengths.sum() == len(ids)
    return [some.tolist() for some in split_ids(ids, lengths)]


@pytest.mark.parametrize("special", ["text", "control"])
@pytest.mark.parametrize("name", VARIANTS)
def test_ids_are_those_of_tokenizers(name: str, special: SpecialTokens) -> None:
    raw = VARIANTS[name]().to_str().encode()
    library = Backend.from_buffer(raw)
    library.encode_special_tokens = special == "text"
    library.no_truncation()
    library.no_padding()
    spec, why = choose_encoder(tokenizer_from_bytes(raw, "tokenizer.json", name, special), SAMPLE)
    assert spec.is_fast == why.startswith("gigatoken 0.") and "\n" not in why
    assert spec.is_fast or name not in FAST, why
    # Unigram has the end of a document as a piece: its name in a text is split (test_load.py).
    texts = [text for text in OTHERS if not (name == "unigram" and EOD in text)]
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert listed(spec, texts) == expected


LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("options", [LLAMA, {}], ids=["Llama's options", "defaults"])
def test_ids_are_those_of_sentencepiece(kind: str, options: dict, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "m"),
        model_type=kind,
        vocab_size=600,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    tokenizer = load_tokenizer(tmp_path)
    library = SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    spec, why = choose_encoder(tokenizer, SAMPLE)
    assert spec.name == ("wordwise" if options == LLAMA else ""), why
    assert listed(spec, OTHERS) == library.encode(OTHERS)


def test_fast_and_exact_agree_on_own_tokenizers(tokenizer: Tokenizer) -> None:
    texts = ["", *OTHERS, "", f"a{EOD}"]
    spec, why = choose_encoder(tokenizer, SAMPLE)
    assert spec.name == ("gigatoken 0.10.0" if tokenizer.kind == "BPE" else "wordwise"), why
    exact, why = choose_encoder(tokenizer, SAMPLE, "exact")
    assert why == f"{tokenizer.library_name} (exact), as requested"
    found = listed(spec, texts)
    assert found == listed(exact, texts)
    assert found == [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert not any(tokenizer.eod_id in ids for ids in found)


def test_a_long_document_is_its_chunks(tokenizer: Tokenizer) -> None:
    text = ("\u6211\u4eec" + "".join(TEXTS)) * 700
    raw = text.encode()
    assert len(raw) > 2 * MAX_CHUNK_BYTES
    chunks = [chunk.decode() for chunk in split_text(raw)]
    expected = [i for chunk in chunks for i in tokenizer.encode(chunk)]
    spec, _ = choose_encoder(tokenizer, [])
    for fast_encoder in (spec.fast_encoder, None):
        chosen = replace(spec, fast_encoder=fast_encoder)
        assert listed(chosen, ["a", text, ""])[1] == expected
    assert tokenizer.decode(expected) == text


def test_specs_travel_between_processes(tokenizer: Tokenizer) -> None:
    spec, _ = choose_encoder(tokenizer, [])
    assert listed(pickle.loads(pickle.dumps(spec)), TEXTS) == listed(spec, TEXTS)


def wrong(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `Gigatoken.__call__` with one wrong id in every text that contains "world"."""

    def encode(self: gigatoken_encoder.Gigatoken, texts: list[bytes]) -> Any:
        ids, lengths = call(self, texts)
        starts = np.cumsum(lengths) - lengths
        for i, text in enumerate(texts):
            if b"world" in text:
                ids = ids.copy()
                ids[starts[i] + 2] += 1
        return ids, lengths

    return encode


def test_wrong_ids_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(TokenizerSpec(500), TEXTS)
    monkeypatch.setattr(
        gigatoken_encoder.Gigatoken, "__call__", wrong(gigatoken_encoder.Gigatoken.__call__)
    )
    spec, why = choose_encoder(tokenizer, [b"fine", b"Hello world"])
    assert not spec.is_fast
    assert why.startswith("tokenizers (exact): gigatoken 0.10.0 gave other ids for a document,")
    assert "first at token 2," in why
    with pytest.raises(DataError, match="the fast encoder cannot be used: .*choose auto or exact"):
        choose_encoder(tokenizer, [b"Hello world"], "fast")
    chosen, _ = choose_encoder(tokenizer, [b"fine"])  # a sample without "world"
    assert chosen.is_fast
    assert find_mismatch(chosen, [b"fine"], tokenizer) is None
    assert "other ids" in str(find_mismatch(chosen, [b"fine", b"Hello world"], tokenizer))
    assert "other ids" in str(chosen.build().find_mismatch([b"Hello world"]))


def test_gigatoken_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(TokenizerSpec(500), TEXTS)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    spec, why = choose_encoder(tokenizer, SAMPLE)
    assert not spec.is_fast and "gigatoken is not installed" in why and "pip install" in why
    with pytest.raises(DataError, match="not installed"):
        choose_encoder(tokenizer, SAMPLE, "fast")


def test_a_panic_makes_it_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """A Rust panic is a BaseException, but no Exception."""

    class Backend:
        def encode(self, text: bytes) -> None:
            raise Panic("index out of bounds\nbacktrace")

    tokenizer = train_tokenizer(TokenizerSpec(500), TEXTS)
    encoder = choose_encoder(tokenizer, SAMPLE)[0].build()
    monkeypatch.setattr(encoder._encode, "_backend", Backend())
    with pytest.raises(
        FastEncoderUnavailable, match=r"cannot encode this text \(index out of bounds\)$"
    ):
        encoder.encode([b"text"])


def test_the_cache_of_gigatoken_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1000 more resident bytes at each look and a limit of 2500, every third call restarts."""
    starts = []
    start, resident = gigatoken_encoder.Gigatoken._start, itertools.count(10**6, 1000)
    monkeypatch.setattr(
        gigatoken_encoder.Gigatoken, "_start", lambda self: (starts.append(1), start(self))
    )
    monkeypatch.setattr(gigatoken_encoder, "resident_bytes", lambda: next(resident))
    monkeypatch.setattr(gigatoken_encoder, "CACHE_BYTES", 2500)
    spec, _ = choose_encoder(train_tokenizer(TokenizerSpec(500), TEXTS), [])
    encoder = spec.build()
    starts.clear()
    texts = [text.encode() for text in documents(5)]
    expected = encoder.encode(texts)
    for _ in range(11):
        assert all(map(np.array_equal, encoder.encode(texts), expected))
    assert len(starts) == 4
