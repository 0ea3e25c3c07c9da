"""Characters of a Unicode that only one of the libraries knows."""

from __future__ import annotations

import sys
import unicodedata

import numpy as np
import pytest

from fgpt.tokenizer import Tokenizer, TokenizerSpec, choose_encoder, train_tokenizer
from fgpt.tokenizer.unicode_guard import UnicodeGuard

pytest.importorskip("gigatoken", reason="pip install 'fgpt[fast]'")

NEWER = "\ua7cf"  # a letter since Unicode 17; libraries built before take it for a sign
UNKNOWN = chr(0x0378)  # assigned in no version so far


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = f"words and words, 12 of them; {NEWER}{NEWER} a{NEWER}b é 中文 "
    return train_tokenizer(TokenizerSpec(vocab_size=320), [text * 20])


def test_they_are_found() -> None:
    texts = ["plain", "é 中文 \U0001f600", f"a{UNKNOWN}", "", f"\U0001f600 {NEWER}"]
    assert UnicodeGuard().within([text.encode() for text in texts]) == [2, 4]
    assert UnicodeGuard().within([]) == []


def test_such_texts_get_the_ids_of_the_library(tokenizer: Tokenizer) -> None:
    texts = ["words", f"a{NEWER} words", "中文", NEWER, "", f"{UNKNOWN}1", "12 words", NEWER * 9]
    spec, why = choose_encoder(tokenizer, [text.encode() for text in texts])
    assert why.startswith("gigatoken")
    ids, lengths = spec.build().encode([text.encode() for text in texts])
    found = [some.tolist() for some in np.split(ids, np.cumsum(lengths)[:-1])]
    assert found == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("around", ["a{}b", "1{}.", "!{} "])
def test_every_other_character_is_the_same_to_both(tokenizer: Tokenizer, around: str) -> None:
    known = [
        chr(c)
        for c in range(1, sys.maxunicode + 1)
        if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    assert len(known) > 140_000
    texts = [around.format(c).encode() for c in known]
    fast = choose_encoder(tokenizer, [], "fast")[0].build()
    exact = choose_encoder(tokenizer, [], "exact")[0].build()
    for start in range(0, len(texts), 20_000):
        some = texts[start : start + 20_000]
        for ours, theirs in zip(fast.encode(some), exact.encode(some), strict=True):
            assert np.array_equal(ours, theirs)
