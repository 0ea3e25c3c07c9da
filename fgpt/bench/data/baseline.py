"""The baseline of `fgpt prepare`: the tokenizer's own library in plain batches, and the comparison.

It reads the files one after the other, encodes lists of texts with the library's own threads, and
writes shards. sentencepiece can also return arrays (`encode_as_numpy`), which is faster and less
known, so that is measured as well. The baseline shares the pipeline's shard format and data rules:
which documents are held out, and that a text is encoded in pieces of 2^20 bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from fgpt.data.shards import IndexedTokens, ShardInfo
from fgpt.prepare.shard_writer import ShardWriter
from fgpt.prepare.sources.corpus import Corpus, ReadStats, read_documents
from fgpt.prepare.split import split_boundaries, split_keys, text_hash
from fgpt.tokenizer.base import Tokenizer, split_text
from fgpt.tokenizer.encoders import choose_encoder

BATCH = 1000
"""Documents per call of the library."""
SPLITS = ("train", "valid")

Encode = Callable[[list[str]], Sequence[np.ndarray]]
"""Texts -> the ids of each, as an array of integers."""


def output_types(tokenizer: Tokenizer) -> tuple[str, ...]:
    """In which forms the library returns ids: "lists", and "arrays" where it can."""
    return ("lists",) if tokenizer.file_name.endswith(".json") else ("lists", "arrays")


def library_encoder(tokenizer: Tokenizer, threads: int, output_type: str) -> Encode:
    """Return the library's encode function; `output_type` is one of `output_types`."""
    if tokenizer.file_name.endswith(".json"):
        backend = tokenizers.Tokenizer.from_buffer(tokenizer.raw)
        backend.encode_special_tokens = True

        def encode(texts: list[str]) -> list[np.ndarray]:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, np.int64) for encoding in encodings]

        return encode
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.raw)

    def encode_sentencepiece(texts: list[str]) -> list[np.ndarray]:
        if output_type == "lists":
            lists = processor.encode(texts, num_threads=threads)
            return [np.array(ids, np.int64) for ids in lists]
        arrays: list[np.ndarray] = processor.encode_as_numpy(texts, num_threads=threads)
        return arrays

    return encode_sentencepiece


def held_out(corpus: Corpus, tokenizer: Tokenizer, fraction: float, seed: int) -> list[int]:
    """For each document 1 if it belongs to the validation split, else 0."""
    encoder = choose_encoder(tokenizer, [])[0].build(tokenizer)
    blocks = []
    for texts in _batches(corpus):
        digests = b"".join(map(text_hash, texts))
        keys = split_keys(seed, np.frombuffer(digests, "u1").reshape(-1, 16))
        blocks.append((keys, encoder.encode(texts)[1] + 1))
    boundaries = split_boundaries(fraction, 0.0, lambda: blocks)
    return [side for keys, _ in blocks for side in boundaries.assign(keys).tolist()]


def prepare_baseline(
    corpus: Corpus,
    tokenizer: Tokenizer,
    threads: int,
    output_type: str,
    is_valid: list[int],
    out: Path,
) -> dict[str, ShardInfo]:
    """Write OUT/train and OUT/valid; `is_valid` is the result of `held_out`.

    The library `tokenizers` ignores `threads` and uses all cores.
    """
    out.mkdir()
    encode = library_encoder(tokenizer, threads, output_type)
    splits = iter(is_valid)
    size = tokenizer.vocab_size
    with ShardWriter(out / "train", size) as train, ShardWriter(out / "valid", size) as valid:
        for texts in _batches(corpus):
            documents_pieces = [list(split_text(text)) for text in texts]
            # names of special tokens count as plain text, which only `Tokenizer` ensures
            has_literal = [any(name in text for name in tokenizer.literals) for text in texts]
            pairs = list(zip(documents_pieces, has_literal, strict=True))
            batch = [piece.decode() for parts, literal in pairs if not literal for piece in parts]
            encoded = iter(encode(batch))
            for parts, literal in pairs:
                if literal:
                    ids = tokenizer.encode_batch([piece.decode() for piece in parts])
                else:
                    ids = [next(encoded) for _ in parts]
                writer = valid if next(splits) else train
                writer.add(np.concatenate([*ids, [tokenizer.eod_id]]))
        return {"train": train.close(), "valid": valid.close()}


def _batches(corpus: Corpus) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for document in read_documents(corpus, ReadStats()):
        batch.append(document.data)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def explain_mismatch(
    corpus: Corpus,
    tokenizer: Tokenizer,
    is_valid: list[int],
    data_sets: tuple[Path, Path],
    out: Path,
) -> str:
    """Say why two data sets differ: the corpus has changed, or the first document with other ids.

    The text of that document, both ids and the tokenizer are saved to a new folder of `out`.
    `is_valid` is the result of `held_out`.
    """
    if corpus.has_changed():
        return f"{corpus.label} changed during the measurement: run again"
    shards = [[IndexedTokens(folder / split) for split in SPLITS] for folder in data_sets]
    counts = Counter[int]()
    pairs = zip(read_documents(corpus, ReadStats()), is_valid, strict=False)
    for number, (document, split) in enumerate(pairs):
        index = counts[split]
        counts[split] += 1
        first, second = (
            shard[split].document(index)
            if index < shard[split].document_count
            else np.zeros(0, np.int64)
            for shard in shards
        )
        if np.array_equal(first, second):
            continue
        shared = min(len(first), len(second))
        unequal = np.flatnonzero(first[:shared] != second[:shared])
        token = int(unequal[0]) if len(unequal) else shared
        folder = out / f"differs-{tokenizer.fingerprint[:12]}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "document.txt").write_bytes(document.data)
        tokenizer.save(folder)
        np.save(folder / "ids_first.npy", first)
        np.save(folder / "ids_second.npy", second)
        facts = {"document": number, "source": document.source, "split": SPLITS[split]}
        (folder / "difference.json").write_text(
            json.dumps(facts | {"token": token}, indent=2) + "\n"
        )
        place = f"document {number} ({document.source}), token {token}"
        return f"ids differ, first in {place}; saved to {folder}"
    return f"all ids are equal, {corpus.label} had other documents in between: run again"
