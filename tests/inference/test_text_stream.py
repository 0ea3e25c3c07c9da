"""Streamed text against the decoding of all tokens at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpt.inference.text_stream import TextStream
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from tests.tokenizer.models import UNIGRAM, model

TEXTS = ["def f(x):\n    return x\n", "hello world " * 20, "\u4e2d\u6587 caf\u00e9 \U0001f600"]
PIECES = [(blank + word, -1.0) for blank in ("", "\u2581") for word in ("a", "be", "\u4e2d")]


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "with a dummy prefix"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte-level":
        return train_tokenizer(TokenizerSpec(300), TEXTS * 5)
    prefix = request.param != "sentencepiece"
    return SentencePieceTokenizer(
        model(UNIGRAM, [*PIECES, ("\u2581", -2.0)], prefix=prefix), "test"
    )


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    pieces = []
    for i in ids:
        pieces.append(stream.add(i))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@given(prompt=st.text(max_size=12), text=st.text(max_size=30))
def test_the_pieces_are_the_text_in_whole_characters(
    tokenizer: Tokenizer, prompt: str, text: str
) -> None:
    start, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    whole = tokenizer.decode([*start, *ids])
    pieces = streamed(TextStream(tokenizer, start), ids)
    assert "".join(pieces) == whole[len(tokenizer.decode(start)) :].rstrip("\ufffd")
    assert not any(piece.endswith("\ufffd") for piece in pieces)


@given(st.lists(st.integers(2, 258), max_size=12))
def test_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Bytes that are no character become what decoding makes of them, except at the end."""
    whole = tokenizer.decode(ids).rstrip("\ufffd")
    assert "".join(streamed(TextStream(tokenizer, []), ids)) == whole


def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    emoji = tokenizer.encode("\U0001f601")
    assert len(emoji) >= 3
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    pieces = [stream.add(i) for i in emoji]
    assert pieces[-3:] == ["", "", "\U0001f601"]
    cut = TextStream(tokenizer, tokenizer.encode("a"))
    assert "".join(streamed(cut, emoji[:-1])) == "".join(pieces[:-1])  # at most a blank


@given(text=st.text("ab", max_size=25), stop=st.lists(st.text("ab", min_size=1, max_size=4)))
def test_a_stop_string_is_not_shown_in_part(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    before, ids = tokenizer.encode("be"), tokenizer.encode(text)
    text = tokenizer.decode([*before, *ids])[2:]  # a dummy prefix is a blank
    # the slow twin: character by character, until the text ends with a stop string
    ends = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stop))]
    wanted = text
    if ends:
        wanted = min((text[: ends[0]].removesuffix(each) for each in stop), key=len)
    stream = TextStream(tokenizer, before, stop)
    pieces = streamed(stream, ids)
    shown = ""
    for piece in pieces:
        shown += piece
        assert wanted.startswith(shown)
    assert shown == wanted == stream.text and stream.stopped == bool(ends)
