"""SentencePiece models learned here are lossless; Chinese costs few tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from fgpt.errors import DataError
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.load import load_tokenizer
from fgpt.tokenizer.sentencepiece_model import BLANK, SentencePieceTokenizer
from fgpt.tokenizer.spec import EOD, Kind, TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from tests.prepare.corpora import run_python
from tests.tokenizer.chinese import MIXED, documents, sentences

KINDS: tuple[Kind, ...] = ("sentencepiece-unigram", "sentencepiece-bpe")
TEXTS = documents(150)


def train(kind: Kind, texts: list[str], vocab_size: int, **spec: str) -> Tokenizer:
    return train_tokenizer(TokenizerSpec(vocab_size, kind=kind, **spec), texts)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train(request.param, [*TEXTS, *MIXED], 800)


def test_chinese_is_covered_and_comes_back(tokenizer: Tokenizer) -> None:
    unseen = documents(40, seed=77)
    encoded = tokenizer.encode_batch(unseen)
    assert [tokenizer.decode(ids) for ids in encoded] == unseen
    ids = np.concatenate(encoded)
    assert tokenizer.unk_id not in ids
    assert np.isin(ids, list(tokenizer.byte_ids)).mean() < 0.001
    # A character of Chinese is 3 bytes; 256 ids for bytes alone would give 0.33 per token.
    assert sum(map(len, unseen)) / len(ids) > 2.0


def test_mixed_text_comes_back(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode_batch(MIXED)
    assert [tokenizer.decode(ids) for ids in encoded] == MIXED
    assert all(tokenizer.eod_id not in ids and tokenizer.unk_id not in ids for ids in encoded)


def test_unseen_characters_become_their_bytes(tokenizer: Tokenizer) -> None:
    for text in ("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\U0001f9ff", "\u9f96"):
        ids = tokenizer.encode(text)
        spelled = "".join(f"<0x{byte:02X}>" for byte in text.encode())
        assert "".join(map(tokenizer.id_to_token, ids)) == spelled
        assert tokenizer.decode(ids) == text


# NUL is refused before a text gets here; surrogates are not text.
character = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
anything = st.text(character) | st.text(f"{BLANK} \t\n<|endoftext>s/的我", max_size=40)


def test_round_trip_of_any_text(tokenizer: Tokenizer) -> None:
    @settings(deadline=None)
    @given(st.lists(anything, min_size=1, max_size=4))
    def check(texts: list[str]) -> None:
        encoded = tokenizer.encode_batch(texts)
        assert [tokenizer.decode(ids) for ids in encoded] == texts
        assert not any(tokenizer.eod_id in ids for ids in encoded)

    check()


def test_ids_are_those_of_the_library(tokenizer: Tokenizer) -> None:
    library = SentencePieceProcessor(model_proto=tokenizer.raw)
    for text in [*TEXTS[:20], *(text for text in MIXED if BLANK not in text)]:
        assert tokenizer.encode(text) == library.encode(text)


def test_the_blank_has_a_piece_whatever_the_text() -> None:
    for kind in KINDS:
        tokenizer = train(kind, sentences(50), 300)  # no blank, and more characters than room
        for text in (" a  b ", *MIXED, *TEXTS[:3]):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_as_control(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    control = load_tokenizer(tmp_path, "control")
    text = f"我们{EOD}{EOD} a{BLANK}b{EOD}"
    ids = control.encode(text)
    assert ids.count(control.eod_id) == 3
    assert control.decode(ids) == text
    assert tokenizer.encode(text) != ids


def test_another_name_for_eod() -> None:
    tokenizer = train("sentencepiece-bpe", TEXTS[:20], 400, eod="<end>")
    assert tokenizer.id_to_token(tokenizer.eod_id) == tokenizer.eod == "<end>"
    assert tokenizer.decode([tokenizer.eod_id]) == "<end>"
    assert tokenizer.eod_id not in tokenizer.encode("a<end>b")


def train_with_defaults(tmp_path: Path, **options: object) -> Path:
    """Train a model with the library's own defaults."""
    text = tmp_path / "text.txt"
    text.write_text("".join(TEXTS))
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=700, minloglevel=2, **options
    )
    return tmp_path / "m.model"


def test_a_model_with_defaults_gives_the_ids_of_its_library(tmp_path: Path) -> None:
    path = train_with_defaults(tmp_path)
    library = SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eod, tokenizer.eod_id) == ("</s>", library.piece_to_id("</s>"))
    for text in [*TEXTS[:5], *MIXED]:
        assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.decode([*tokenizer.encode("我们"), tokenizer.eod_id]) == "我们</s>"


def test_a_user_defined_end_of_document_is_text_in_a_text(tmp_path: Path) -> None:
    path = train_with_defaults(
        tmp_path, user_defined_symbols=["<|im_end|>", "<tool>"], byte_fallback=True
    )
    library = SentencePieceProcessor(model_file=str(path))
    eod = library.piece_to_id("<|im_end|>")
    assert eod in library.encode("a<|im_end|>")  # the library's own behavior
    tokenizer = load_tokenizer(path, eod="<|im_end|>")
    ids = tokenizer.encode("我们<|im_end|>")
    assert tokenizer.eod_id == eod and eod not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "我们<|im_end|>"
    assert library.piece_to_id("<tool>") in tokenizer.encode("<tool>")  # a piece like any other
    assert load_tokenizer(path, "control", "<|im_end|>").encode("<|im_end|>") == [eod]


def test_no_room_and_no_text() -> None:
    for kind in KINDS:
        with pytest.raises(DataError, match='vocab_size" is 259; at least 260 is needed'):
            train(kind, TEXTS, 259)
        assert train(kind, TEXTS, 260).vocab_size <= 260
        assert train(kind, ["abc"], 50_000).vocab_size < 300
        for texts in ([], [" \n"]):
            with pytest.raises(DataError, match="no text to learn"):
                train(kind, texts, 300)
        with pytest.raises(DataError, match="UTF-8"):
            train(kind, ["a\ud800"], 300)


TRAIN = """
import sys
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from tests.tokenizer.chinese import documents
for kind in ("sentencepiece-unigram", "sentencepiece-bpe"):
    print(train_tokenizer(TokenizerSpec(600, kind=kind), documents(60)).fingerprint)
"""


def test_training_gives_the_same_bytes() -> None:
    runs = [run_python(TRAIN, PYTHONHASHSEED=seed, OMP_NUM_THREADS=seed) for seed in ("1", "2")]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.split()) == 2
    assert not runs[0].stderr  # the trainer's messages are silenced


def test_a_long_line_takes_little(tokenizer: Tokenizer) -> None:
    line = "".join(TEXTS).replace("\n", "") * 40
    assert len(line.encode()) > 2**21
    assert tokenizer.decode(tokenizer.encode(line)) == line
    learned = train(tokenizer.kind, ["abc" * 1_000_000, line], 400)  # type: ignore[arg-type]
    assert isinstance(learned, SentencePieceTokenizer)


def test_the_models_own_end_comes_first(tmp_path: Path) -> None:
    """A user piece </s> beside the declared end <eos>."""
    texts, prefix = tmp_path / "t.txt", tmp_path / "m"
    texts.write_text("\n".join(TEXTS[:20]), "utf-8")
    SentencePieceTrainer.train(
        input=str(texts),
        model_prefix=str(prefix),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        eos_piece="<eos>",
        user_defined_symbols=["</s>"],
        minloglevel=2,
    )
    loaded = load_tokenizer(prefix.with_suffix(".model"))
    assert loaded.eod == "<eos>"
    assert load_tokenizer(prefix.with_suffix(".model"), eod="</s>").eod == "</s>"
