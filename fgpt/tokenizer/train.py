"""Learn a tokenizer from text. The same texts in the same order give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fgpt.errors import DataError
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.hf_tokenizer import JsonTokenizer
from fgpt.tokenizer.sampling import chunks, spread
from fgpt.tokenizer.spec import EOD, TokenizerSpec, spec_faults
from fgpt.tokenizer.train_sentencepiece import train_sentencepiece

# A run of this many letters is no word. It would teach the vocabulary nothing, and BPE training
# takes time (length of a word) x (number of merges): hours for a line of 50 MB.
_NO_WORD = re.compile(r"\w{1000,}")

# The trainer holds every different word, at about 100 bytes of memory for a byte of it: of text in
# a script without blanks, where hardly a word comes twice, 20 MB take 2 GB. Of English, 200 MB take
# 0.5 GB. So a byte that is not ASCII counts as ten.
LEARN_COST = 200 * 10**6
CHUNK_CHARS = 2**20


def train_tokenizer(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Learn a tokenizer of at most `spec.vocab_size` ids (fewer if the text does not give more).

    Reads all of `texts` (`spec.sample_mb` is for the caller). Raises DataError.
    """
    faults = spec_faults(spec)
    if faults:
        raise DataError("; ".join(faults))
    try:
        return _train_bpe(spec, texts) if spec.kind == "bpe" else train_sentencepiece(spec, texts)
    except UnicodeEncodeError as error:
        raise DataError(f"text cannot be encoded as UTF-8 ({error})") from error


def _train_bpe(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE: any text can be encoded, and decode(encode(text)) == text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[spec.eod or EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    large = (chunk for text in texts for chunk in chunks(text, CHUNK_CHARS))
    chosen = spread(large, LEARN_COST, _cost)
    backend.train_from_iterator((_NO_WORD.sub(" ", chunk) for chunk in chosen), trainer)
    raw = backend.to_str().encode()
    return JsonTokenizer(raw, "new tokenizer", spec.special_tokens, spec.eod)


def _cost(text: str) -> int:
    """Bytes of UTF-8, those of other characters than ASCII ten times."""
    size = len(text.encode())
    return size + 13 * (size - len(text))  # Chinese: 3 bytes a character, 29; Russian: 2, 15
