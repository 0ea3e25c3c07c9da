"""Characters under other names: gigatoken's ids are still those of the library."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers

from fgpt.tokenizer import Tokenizer, TokenizerSpec, choose_encoder, train_tokenizer
from fgpt.tokenizer.encoders import Encoder
from fgpt.tokenizer.gigatoken_settings import GigaSettings, giga_settings
from fgpt.tokenizer.load import from_bytes
from fgpt.tokenizer.spec import EOD

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
def encoder(learned: Tokenizer) -> Encoder:
    settings = giga_settings(learned)
    assert settings.names is not None
    return Encoder(learned, settings)


def test_every_sign_has_another_name(learned: Tokenizer) -> None:
    told = giga_settings(learned)
    assert told.names is not None
    assert told.names.translate(told.names) == bytes(range(256))
    changed = [i for i in range(256) if told.names[i] != i]
    assert bytes(changed).decode() == "".join(sorted(SIGNS))
    vocab = json.loads(told.json)["model"]["vocab"]
    own = {learned.token(i): i for i in range(learned.vocab_size)}
    assert vocab["<0x21>"] == own["<0x5F>"] and vocab["<0x61>"] == own["<0x61>"]
    assert vocab["?"] == own["\n"] and "!" in vocab and "!" not in own


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_ids_are_those_of_sentencepiece(learned: Tokenizer, encoder: Encoder, text: str) -> None:
    plain = SentencePieceProcessor(model_proto=learned.raw)
    assert encoder.encode([text.encode()])[0].tolist() == plain.encode(text)


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
    tokenizer = from_bytes(raw, "tokenizer.json", "llama", special)
    spec, why = choose_encoder(tokenizer, [])
    assert isinstance(spec.settings, GigaSettings) and spec.settings.names is not None, why
    draw = np.random.default_rng(0)
    alphabet = [*SIGNS, *" ab", "_;_", "(a_", ";\n", EOD]
    texts = ["".join(draw.choice(alphabet, 20)) for _ in range(200)]
    backend.encode_special_tokens = special == "text"
    ids, lengths = spec.build().encode([text.encode() for text in texts])
    found = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    assert found == [backend.encode(text, add_special_tokens=False).ids for text in texts]


def test_names_stay_where_others_know_characters() -> None:
    for step in (normalizers.NFKC(), normalizers.Strip(), normalizers.Replace("(", "[")):
        raw = llama(step=step).to_str().encode()
        assert giga_settings(from_bytes(raw, "tokenizer.json", "llama")).names is None
    assert giga_settings(train_tokenizer(TokenizerSpec(300), CODE)).names is None
