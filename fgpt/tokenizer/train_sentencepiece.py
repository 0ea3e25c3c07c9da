"""Learn a SentencePiece model that keeps every text: nothing is normalized, and a character that is
not in the vocabulary becomes its bytes.

Line ends are characters like any other (pieces such as ":\\n" save tokens in code), runs of blanks
may be pieces. The library holds all it learns from in memory, 15-30 times its size, and Unigram
takes 3-5 s per MB, so it is given LEARN_BYTES at most: chunks of text chosen by a fixed draw.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from sentencepiece import SentencePieceTrainer

from fgpt.errors import DataError
from fgpt.tokenizer.sampling import chunks, spread
from fgpt.tokenizer.sentencepiece_model import BLANK, SentencePieceTokenizer
from fgpt.tokenizer.spec import EOD, MIN_VOCAB, Kind, TokenizerSpec

LEARN_BYTES: dict[Kind, int] = {
    "sentencepiece-unigram": 32 * 10**6,
    "sentencepiece-bpe": 64 * 10**6,
}
CHUNK_CHARS = 1000
# Of the characters in the text, by frequency. The rest, seen once in 10,000 characters together,
# would cost more rows of the vocabulary than they save tokens.
COVERAGE = 0.9999
# The trainer passes over sentences that contain these two.
RESERVED = "\0\u2585"
# The trainer's sums of floats depend on the number of threads: it must not be the machine's.
THREADS = 4


def train_sentencepiece(spec: TokenizerSpec, texts: Iterable[str]) -> SentencePieceTokenizer:
    """Learn a model of `spec.kind` with at most `spec.vocab_size` pieces. Raises DataError."""
    small = (chunk for text in texts for chunk in chunks(text, CHUNK_CHARS))
    chosen = spread(small, LEARN_BYTES[spec.kind], lambda chunk: len(chunk.encode()))
    if not any(chunk.strip() for chunk in chosen):
        raise DataError("no text to learn a tokenizer from")
    room = spec.vocab_size - MIN_VOCAB[spec.kind]
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_without_rare(chosen, max(1, room // 2)),
            model_writer=model,
            model_type=spec.kind.removeprefix("sentencepiece-"),
            vocab_size=spec.vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars=BLANK,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * CHUNK_CHARS,
            num_threads=THREADS,
            unk_id=0,
            eos_id=1,
            eos_piece=spec.eod or EOD,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(f"SentencePiece cannot learn from this text: {_first(error)}") from error
    return SentencePieceTokenizer(model.getvalue(), "new tokenizer", spec.special_tokens, spec.eod)


def _without_rare(chosen: list[str], most: int) -> Iterator[str]:
    """Cut the text at its rare characters: what COVERAGE or the `most` frequent ones leave out.

    (The library's own character_coverage takes no less than 0.98, which a small vocabulary of
    Chinese cannot give.)
    """
    counts: Counter[str] = Counter()
    for chunk in chosen:
        counts.update(chunk)
    left = counts.total() * COVERAGE
    rare = set(RESERVED)
    for i, (character, count) in enumerate(counts.most_common()):
        if character != " " and (left <= 0 or i >= most):
            rare.add(character)
        left -= count
    pattern = re.compile("[" + re.escape("".join(sorted(rare))) + "]+")
    for chunk in chosen:
        yield from filter(None, pattern.split(chunk))


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
