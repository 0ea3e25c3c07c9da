"""Find and read a tokenizer: a file, or the one in a directory. Pickles are never loaded.

tokenizer.json                            the library `tokenizers`
*.model                                   SentencePiece
vocab.json + merges.txt, encoder.json + vocab.bpe   GPT-2's files: become a tokenizer.json in memory
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fgpt.errors import DataError
from fgpt.tokenizer import hf_tokenizer
from fgpt.tokenizer.base import EOD_NAMES, Tokenizer
from fgpt.tokenizer.hf_tokenizer import JsonTokenizer
from fgpt.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fgpt.tokenizer.sentencepiece_proto import ModelFacts
from fgpt.tokenizer.spec import SpecialTokens

MAX_BYTES = 2**29
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def load_tokenizer(
    path: str | Path, special_tokens: SpecialTokens = "text", eod: str | None = None
) -> Tokenizer:
    """Load a tokenizer.json, a SentencePiece .model, or what a directory holds of the two or of
    GPT-2's files. Raises DataError naming the file.
    """
    file = tokenizer_file(Path(path)) if Path(path).is_dir() else Path(path)
    if file.is_dir():
        name, raw = hf_tokenizer.FILE_NAME, _from_gpt2(file, eod)
    else:
        name, raw = file.name, _read(file)
    return from_bytes(raw, name, str(file), special_tokens, eod)


def from_bytes(
    raw: bytes,
    name: str,
    where: str,
    special_tokens: SpecialTokens = "text",
    eod: str | None = None,
    facts: ModelFacts | None = None,
) -> Tokenizer:
    """Read a tokenizer's bytes; `name` is its file's name, `where` is named in errors, `facts` are
    those of a .model if they were read before.
    """
    if raw.lstrip()[:1] in (b"{", b"["):
        return JsonTokenizer(raw, where, special_tokens, eod)
    if raw.startswith(b"\x80"):
        raise DataError(
            f"{where}: a pickle, which is never loaded; give a tokenizer.json or .model"
        )
    if _TIKTOKEN.match(raw):
        fix = "give the tokenizer.json of the same model"
        raise DataError(f"{where}: a tiktoken file, which has no rule to cut words; {fix}")
    if name.endswith(".json"):
        raise DataError(f"{where}: not a tokenizer.json (no JSON object)")
    return SentencePieceTokenizer(raw, where, special_tokens, eod, facts)


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer's file in a directory; the directory itself if that holds GPT-2's files.

    Raises DataError if there is none, or more than one to choose from.
    """
    found = sorted(folder.glob("*.model"))
    if (folder / hf_tokenizer.FILE_NAME).exists():
        found.insert(0, folder / hf_tokenizer.FILE_NAME)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: holds more than one tokenizer ({names}); name the file")
    if found:
        return found[0]
    if any((folder / vocabulary).exists() for vocabulary, _ in GPT2_FILES):
        return folder
    wanted = f"{hf_tokenizer.FILE_NAME}, *.model, or vocab.json with merges.txt"
    raise DataError(f"{folder}: no tokenizer here ({wanted})")


def _read(file: Path) -> bytes:
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{file}: {size} bytes; a tokenizer has at most {MAX_BYTES}")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _from_gpt2(folder: Path, eod: str | None) -> bytes:
    """The tokenizer.json that says what GPT-2's two files say."""
    for names in GPT2_FILES:
        vocabulary, merges = (folder / name for name in names)
        if vocabulary.exists() and merges.exists():
            break
    else:
        raise DataError(
            f"{folder}: vocab.json needs merges.txt beside it (encoder.json: vocab.bpe)"
        )
    for file in (vocabulary, merges):
        _read(file)
    try:
        backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{folder}: {vocabulary.name} and {merges.name}: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    known = [name for name in (eod, *EOD_NAMES) if name and backend.token_to_id(name) is not None]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in known[:1]])
    return backend.to_str().encode()
