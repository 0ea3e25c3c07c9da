"""The slow twin of `fgpt prepare`: the same shards, by the tokenizer's library in plain batches.

As people write it: read the files one after the other, encode lists of texts with the library's own
threads, write. sentencepiece can also give arrays where it gives lists of integers, which is faster
and little known (`encode_as_numpy`): that is measured, too. The twin shares with the pipeline the
format of shards and the rules of the data: which documents are held out, and that a text is encoded
in pieces of 2^20 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from fgpt.data.shards import ShardInfo
from fgpt.prepare.shard_writer import ShardWriter
from fgpt.prepare.sources.corpus import Corpus, Tally, documents
from fgpt.prepare.split import split_keys, split_limits, text_hash
from fgpt.tokenizer.base import Tokenizer, split_text

BATCH = 1000

Encode = Callable[[list[str]], Sequence[np.ndarray]]
"""Texts -> ids of each, as an array of integers."""


def ways(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Ways in which its library gives ids: as everybody calls it, and faster if there is one."""
    return ("lists",) if tokenizer.file_name.endswith(".json") else ("lists", "arrays")


def library_of(tokenizer: Tokenizer, threads: int, way: str) -> Encode:
    """Texts to ids, by the library alone; `way` is one of `ways`."""
    if tokenizer.file_name.endswith(".json"):
        backend = tokenizers.Tokenizer.from_buffer(tokenizer.raw)
        backend.encode_special_tokens = True

        def encode(texts: list[str]) -> list[np.ndarray]:
            found = backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(one.ids, np.int64) for one in found]

        return encode
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.raw)

    def encode_pieces(texts: list[str]) -> list[np.ndarray]:
        if way == "lists":
            found = processor.encode(texts, num_threads=threads)
            return [np.array(ids, np.int64) for ids in found]
        arrays: list[np.ndarray] = processor.encode_as_numpy(texts, num_threads=threads)
        return arrays

    return encode_pieces


def held_out(corpus: Corpus, fraction: float, seed: int) -> list[int]:
    """0 or 1 for each document: training or validation."""
    digests = b"".join(text_hash(document.data) for document in documents(corpus, Tally()))
    keys = split_keys(seed, np.frombuffer(digests, "u1").reshape(-1, 16))
    found: list[int] = split_limits(fraction, 0.0, lambda: [keys]).side(keys).tolist()
    return found


def prepare_plainly(
    corpus: Corpus, tokenizer: Tokenizer, threads: int, way: str, is_valid: list[int], out: Path
) -> dict[str, ShardInfo]:
    """Write OUT/train and OUT/valid; `way` is one of `ways`, `is_valid` is what `held_out` says.

    The library `tokenizers` uses all cores whatever `threads` is.
    """
    out.mkdir()
    encode = library_of(tokenizer, threads, way)
    sides = iter(is_valid)
    size = tokenizer.vocab_size
    with ShardWriter(out / "train", size) as train, ShardWriter(out / "valid", size) as valid:
        for texts in _batches(corpus):
            cut = [list(split_text(text)) for text in texts]
            # names of special tokens are text, which the library alone does not know
            odd = [any(name in text for name in tokenizer.literals) for text in texts]
            plain = [parts for parts, is_odd in zip(cut, odd, strict=True) if not is_odd]
            found = iter(encode([piece.decode() for parts in plain for piece in parts]))
            for parts, is_odd in zip(cut, odd, strict=True):
                if is_odd:
                    some = tokenizer.encode_batch([part.decode() for part in parts])
                else:
                    some = [next(found) for _ in parts]
                writer = valid if next(sides) else train
                writer.add(np.concatenate([*some, [tokenizer.eod_id]]))
        return {"train": train.close(), "valid": valid.close()}


def _batches(corpus: Corpus) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for document in documents(corpus, Tally()):
        batch.append(document.data)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
