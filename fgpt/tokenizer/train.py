"""Learn a tokenizer from text. The same texts in the same order give the same file.

Each trainer gets a bounded sample of the text, drawn with a fixed seed.
"""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fgpt.errors import DataError
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.hf_tokenizer import HFTokenizer
from fgpt.tokenizer.sentencepiece_model import BLANK, SentencePieceTokenizer
from fgpt.tokenizer.spec import EOD, MIN_VOCAB, Kind, TokenizerSpec, spec_issues

# ---- byte-level BPE ----
BPE_CHUNK_CHARS = 2**20
# The trainer keeps every distinct word, at about 100 bytes of memory per byte. 200 MB of English
# take 0.5 GB; 20 MB of a script without blanks, where words hardly repeat, take 2 GB. So a byte
# that is not ASCII costs ten times as much.
BPE_SAMPLE_COST = 200 * 10**6
# A run of this many letters, signs or blanks is no word, and training time grows with (length of a
# word) x (number of merges): hours for a line of 50 MB, a minute for 200,000 equals signs. These
# are the kinds into which byte-level BPE cuts a text (there, _ is a sign).
_TOO_LONG_WORD = re.compile(r"\w{1000,}|(?:[^\w\s]|_){1000,}|\s{1000,}")

# ---- SentencePiece ----
SENTENCEPIECE_CHUNK_CHARS = 1000
# The trainer needs 15-30 times the size of its text in memory, and Unigram 3-5 s per MB.
SENTENCEPIECE_SAMPLE_BYTES: dict[Kind, int] = {
    "sentencepiece-unigram": 32 * 10**6,
    "sentencepiece-bpe": 64 * 10**6,
}
# Share of the characters in the text that get a piece, the most frequent first. The rest would cost
# more rows of the vocabulary than they save tokens.
CHARACTER_COVERAGE = 0.9999
# The trainer skips sentences with these two.
RESERVED = "\0\u2585"
# The trainer's float sums depend on the number of threads, so it must not follow the machine.
THREADS = 4


def train_tokenizer(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Learn a tokenizer of at most `spec.vocab_size` ids (fewer if the text does not give more).

    Reads all of `texts`; the caller applies `spec.sample_mb`. Raises DataError.
    """
    issues = spec_issues(spec)
    if issues:
        raise DataError("; ".join(issues))
    try:
        return _train_bpe(spec, texts) if spec.kind == "bpe" else _train_sentencepiece(spec, texts)
    except UnicodeEncodeError as error:
        raise DataError(f"text cannot be encoded as UTF-8 ({error})") from error


def _train_bpe(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Learn byte-level BPE, which can encode any text and is lossless."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[spec.eod or EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = sample_chunks(texts, BPE_CHUNK_CHARS, BPE_SAMPLE_COST, _bpe_cost)
    backend.train_from_iterator((_TOO_LONG_WORD.sub(" ", chunk) for chunk in sample), trainer)
    raw = backend.to_str().encode()
    return HFTokenizer(raw, "new tokenizer", spec.special_tokens, spec.eod)


def _bpe_cost(text: str) -> int:
    """Return the number of UTF-8 bytes, those of non-ASCII characters counted about ten times."""
    size = len(text.encode())
    return size + 13 * (size - len(text))  # Chinese: 3 bytes cost 29; Russian: 2 bytes cost 15


def _train_sentencepiece(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Learn a lossless SentencePiece model: nothing is normalized, and unknown characters become
    bytes. Line ends and runs of blanks may be part of pieces (":\\n" saves tokens in code).
    """
    limit = SENTENCEPIECE_SAMPLE_BYTES[spec.kind]
    sample = sample_chunks(
        texts, SENTENCEPIECE_CHUNK_CHARS, limit, lambda chunk: len(chunk.encode())
    )
    if not any(chunk.strip() for chunk in sample):
        raise DataError("no text to learn a tokenizer from")
    free_ids = spec.vocab_size - MIN_VOCAB[spec.kind]
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_split_at_rare_characters(sample, max(1, free_ids // 2)),
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
            max_sentence_length=4 * SENTENCEPIECE_CHUNK_CHARS,
            num_threads=THREADS,
            unk_id=0,
            eos_id=1,
            eos_piece=spec.eod or EOD,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise DataError(f"SentencePiece cannot learn from this text: {reason}") from error
    return SentencePieceTokenizer(model.getvalue(), "new tokenizer", spec.special_tokens, spec.eod)


def _split_at_rare_characters(chunks: list[str], max_characters: int) -> Iterator[str]:
    """Split text at characters outside CHARACTER_COVERAGE or the `max_characters` most frequent.

    (The library's own character_coverage accepts no less than 0.98, too much for a small vocabulary
    of Chinese.)
    """
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk)
    left = counts.total() * CHARACTER_COVERAGE
    rare = set(RESERVED)
    for i, (character, count) in enumerate(counts.most_common()):
        if character != " " and (left <= 0 or i >= max_characters):
            rare.add(character)
        left -= count
    pattern = re.compile("[" + re.escape("".join(sorted(rare))) + "]+")
    for chunk in chunks:
        yield from filter(None, pattern.split(chunk))


def sample_chunks(
    texts: Iterable[str], max_chars: int, limit: int, cost: Callable[[str], int]
) -> list[str]:
    """Split texts into chunks, and return all, or a random sample that costs limit/2 .. limit.

    Each chunk draws a number from a fixed seed; whenever the limit is exceeded, the chunks with the
    larger half of the numbers are dropped.
    """
    draw = random.Random(0)
    bound, spent = 1 << 32, 0
    kept: list[tuple[int, int, str]] = []
    for chunk in (chunk for text in texts for chunk in split_into_chunks(text, max_chars)):
        number = draw.getrandbits(32)
        if number >= bound:
            continue
        price = cost(chunk)
        kept.append((number, price, chunk))
        spent += price
        while spent > limit and bound > 1:
            bound //= 2
            kept = [entry for entry in kept if entry[0] < bound]
            spent = sum(price for _, price, _ in kept)
    return [chunk for _, _, chunk in kept]


def split_into_chunks(text: str, max_chars: int) -> Iterator[str]:
    """Split a text into chunks of at most `max_chars` characters, at line ends where possible."""
    start = 0
    while start < len(text):
        end = start + max_chars
        if end < len(text):
            line_end = text.rfind("\n", start, end)
            end = line_end + 1 if line_end >= 0 else end
        yield text[start:end]
        start = end
