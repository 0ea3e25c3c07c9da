"""Learn a tokenizer from text. The same texts in the same order give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fgpt.data.tokenizer.base import Tokenizer
from fgpt.data.tokenizer.jsonfile import JsonTokenizer
from fgpt.data.tokenizer.spec import EOD, TokenizerSpec, spec_faults
from fgpt.data.tokenizer.train_sentence import train_sentencepiece
from fgpt.errors import DataError

# A run of this many letters is no word. It would teach the vocabulary nothing, and BPE training
# takes time (length of a word) x (number of merges): hours for a line of 50 MB.
_NO_WORD = re.compile(r"\w{1000,}")


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
    backend.train_from_iterator((_NO_WORD.sub(" ", text) for text in texts), trainer)
    raw = backend.to_str().encode()
    return JsonTokenizer(raw, "new tokenizer", spec.special_tokens, spec.eod)
