"""tokenizer.json files with the features on which encoders tend to differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from fgpt.tokenizer.spec import EOD
from tests.tokenizer.chinese import MIXED, documents

TEXTS = [
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\n",
    "Hello world, HELLO World! don't I'LL we've 1234567 caf\u00e9 cafe\u0301",
    *MIXED,
    *documents(3),
]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(**options: Any) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options)
    backend.decoder = decoders.ByteLevel()
    return backend


def trained(backend: Backend, size: int = 420) -> Backend:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def with_added(*tokens: AddedToken, special: bool = False) -> Backend:
    backend = trained(byte_level())
    (backend.add_special_tokens if special else backend.add_tokens)(list(tokens))
    return backend


def normalized(normalizer: normalizers.Normalizer) -> Backend:
    backend = byte_level()
    backend.normalizer = normalizer
    return trained(backend)


def split_by(pattern: str) -> Backend:
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    backend.decoder = decoders.ByteLevel()
    return trained(backend)


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", EOD], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", EOD], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _settings(**changes: Any) -> Backend:
    value = json.loads(trained(byte_level()).to_str())
    for key, change in changes.items():
        value[key] = value[key] | change if isinstance(value[key], dict) else change
    return Backend.from_str(json.dumps(value))


TRUNCATION = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": EOD,
}

VARIANTS: dict[str, Callable[[], Backend]] = {
    "plain": lambda: trained(byte_level()),
    "blank in front": lambda: trained(byte_level(add_prefix_space=True)),
    "no regex": lambda: trained(byte_level(use_regex=False)),
    "pattern of GPT-4": lambda: split_by(GPT4),
    "unusual pattern": lambda: split_by(r"[aeiou]+|\s+|\S"),
    "lower case": lambda: normalized(normalizers.Lowercase()),
    "NFC": lambda: normalized(normalizers.NFC()),
    "NFKC, no accents": lambda: normalized(
        normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    ),
    "added": lambda: with_added(AddedToken("return"), AddedToken("语言模型")),
    "added, strips": lambda: with_added(AddedToken("class", lstrip=True, rstrip=True)),
    "added, whole words": lambda: with_added(AddedToken("world", single_word=True)),
    "added, normalized": lambda: with_added(AddedToken("Hello", normalized=True)),
    "added, overlap": lambda: with_added(AddedToken("ab"), AddedToken("abc"), AddedToken("bcd")),
    "special, strips": lambda: with_added(
        AddedToken("<|im_end|>", lstrip=True, rstrip=True), special=True
    ),
    "special in added": lambda: with_added(AddedToken(f"x{EOD}y"), AddedToken("<|")),
    "truncation, padding": lambda: _settings(truncation=TRUNCATION, padding=PADDING),
    "ignore merges": lambda: _settings(model={"ignore_merges": True}),
    "unigram": unigram,
    "word pieces": word_piece,
}
FAST = {
    *("plain", "blank in front", "pattern of GPT-4", "NFC", "added", "added, strips"),
    *("added, normalized", "added, overlap", "special, strips", "truncation, padding"),
    "ignore merges",
}
"""Variants that gigatoken 0.10 encodes with the library's ids, for both kinds of special_tokens."""
