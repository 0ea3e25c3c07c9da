"""gigatoken's ids are those of the library, for every kind of BPE and every character."""

from __future__ import annotations

import sys
import unicodedata
from importlib.metadata import version

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers

from fgpt.tokenizer.base import Tokenizer, split_ids
from fgpt.tokenizer.encoders import choose_encoder
from fgpt.tokenizer.gigatoken_encoder import Gigatoken, UnicodeGuard
from fgpt.tokenizer.load import tokenizer_from_bytes
from fgpt.tokenizer.spec import EOD, TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from tests.tokenizer.models import BPE, PieceType, model

pytest.importorskip("gigatoken", reason="pip install 'fgpt[fast]'")

SIGNS = "(_\n;!?"
# ( _ \n ; are pieces, alone and with others; ! and ? are in no piece: they become bytes
CODE = ["def f_g(a_b, c);\n\n    x = (a_b);;\n", "if (__name__):\n", "a_(b)_c;\n(d)"] * 50
BITS = [*SIGNS, *' .,"):ab\u4e2d', "__", ");\n", "<0x0A>", "<0x3F>"]
TEXT = st.lists(st.sampled_from(BITS), max_size=40).map("".join)


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return train_tokenizer(TokenizerSpec(340, kind="sentencepiece-bpe"), CODE)


@pytest.fixture(scope="module")
def gigatoken(learned: Tokenizer) -> Gigatoken:
    return Gigatoken(learned)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_ids_are_those_of_sentencepiece(
    learned: Tokenizer, gigatoken: Gigatoken, text: str
) -> None:
    library = SentencePieceProcessor(model_proto=learned.raw)
    assert gigatoken([text.encode()])[0].tolist() == library.encode(text)


def test_a_model_that_wordwise_does_not_support() -> None:
    pieces = [("\u2581", -9.0), *((letter, -8.0) for letter in "abc"), ("ab", -1.0)]
    raw = model(BPE, pieces, [("<tool>", 0.0, PieceType.USER_DEFINED)])
    tokenizer = tokenizer_from_bytes(raw, "tokenizer.model", "by hand")
    spec, why = choose_encoder(tokenizer, [b"abc ab"])
    assert spec.name == f"gigatoken {version('gigatoken')}"
    assert why.startswith("gigatoken 0.") and "it has user-defined pieces" in why
    assert "\n" not in why


def llama(**changes: object) -> Backend:
    """A tokenizer.json with byte fallback, as Llama's."""
    signs = [*SIGNS[:4], *"ab", "\u2581", "a_", "(a", ";\n"]
    names = ["<unk>", EOD, *(f"<0x{byte:02X}>" for byte in range(256)), *signs]
    merges = [("a", "_"), ("(", "a"), (";", "\n")]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([EOD])
    backend.add_tokens(["_;_"])
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence([*steps, *changes.values()])
    return backend


@pytest.mark.parametrize("special", ["text", "control"])
def test_ids_are_those_of_tokenizers(special: str) -> None:
    backend = llama()
    raw = backend.to_str().encode()
    tokenizer = tokenizer_from_bytes(raw, "tokenizer.json", "llama", special)
    spec, why = choose_encoder(tokenizer, [])
    assert spec.fast_encoder == "gigatoken", why
    draw = np.random.default_rng(0)
    alphabet = [*SIGNS, *" ab", "_;_", "(a_", ";\n", EOD]
    texts = ["".join(draw.choice(alphabet, 20)) for _ in range(200)]
    backend.encode_special_tokens = special == "text"
    found = [ids.tolist() for ids in split_ids(*spec.build().encode([t.encode() for t in texts]))]
    assert found == [backend.encode(text, add_special_tokens=False).ids for text in texts]


# ---- characters of a Unicode that only one of the libraries knows ----

NEWER = "\ua7cf"  # a letter since Unicode 17; libraries built before take it for a sign
UNKNOWN = chr(0x0378)  # assigned in no version so far


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    text = f"words and words, 12 of them; {NEWER}{NEWER} a{NEWER}b é 中文 "
    return train_tokenizer(TokenizerSpec(vocab_size=320), [text * 20])


def test_unassigned_characters_are_found() -> None:
    texts = ["plain", "é 中文 \U0001f600", f"a{UNKNOWN}", "", f"\U0001f600 {NEWER}"]
    assert UnicodeGuard().find([text.encode() for text in texts]) == [2, 4]
    assert UnicodeGuard().find([]) == []


def test_such_texts_get_the_ids_of_the_library(bpe: Tokenizer) -> None:
    texts = ["words", f"a{NEWER} words", "中文", NEWER, "", f"{UNKNOWN}1", "12 words", NEWER * 9]
    spec, why = choose_encoder(bpe, [text.encode() for text in texts])
    assert why.startswith("gigatoken")
    found = split_ids(*spec.build().encode([text.encode() for text in texts]))
    assert [ids.tolist() for ids in found] == [bpe.encode(text) for text in texts]


@pytest.mark.parametrize("around", ["a{}b", "1{}.", "!{} "])
def test_every_other_character_is_the_same_to_both(bpe: Tokenizer, around: str) -> None:
    known = [
        chr(c)
        for c in range(1, sys.maxunicode + 1)
        if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    assert len(known) > 140_000
    texts = [around.format(c).encode() for c in known]
    fast = choose_encoder(bpe, [], "fast")[0].build()
    exact = choose_encoder(bpe, [], "exact")[0].build()
    for start in range(0, len(texts), 20_000):
        some = texts[start : start + 20_000]
        for ours, theirs in zip(fast.encode(some), exact.encode(some), strict=True):
            assert np.array_equal(ours, theirs)
