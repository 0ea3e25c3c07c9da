"""Load a tokenizer from a file or a directory. Pickles are never loaded.

tokenizer.json                                      encoded by the library `tokenizers`
*.model                                             encoded by the library `sentencepiece`
vocab.json + merges.txt, encoder.json + vocab.bpe   GPT-2's files, converted to a tokenizer.json
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fgpt.errors import DataError
from fgpt.tokenizer import hf_tokenizer
from fgpt.tokenizer.base import EOD_NAMES, Tokenizer
from fgpt.tokenizer.hf_tokenizer import HFTokenizer
from fgpt.tokenizer.spec import SpecialTokens
from fgpt.utils.files import write_atomic

MAX_FILE_BYTES = 2**29
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
COPY = "tokenizer"
"""Directory of a run with a copy of its tokenizer."""
COPY_SETTINGS = "settings.json"
"""Beside a copied tokenizer: what its file does not say."""
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def load_tokenizer(
    path: str | Path, special_tokens: SpecialTokens = "text", eod: str | None = None
) -> Tokenizer:
    """Load a tokenizer.json, a SentencePiece .model, or the one tokenizer in a directory.

    Raises DataError naming the file.
    """
    file = find_tokenizer_file(Path(path)) if Path(path).is_dir() else Path(path)
    if file.is_dir():
        name, raw = hf_tokenizer.FILE_NAME, _convert_gpt2(file, eod)
    else:
        name, raw = file.name, _read(file)
    return tokenizer_from_bytes(raw, name, str(file), special_tokens, eod)


def tokenizer_from_bytes(
    raw: bytes,
    name: str,
    where: str,
    special_tokens: SpecialTokens = "text",
    eod: str | None = None,
) -> Tokenizer:
    """Parse the content of a tokenizer's file. `name` is the file's name, `where` starts error
    messages (DataError).
    """
    if raw.lstrip()[:1] in (b"{", b"["):
        return HFTokenizer(raw, where, special_tokens, eod)
    if raw.startswith(b"\x80"):
        raise DataError(
            f"{where}: a pickle, which is never loaded; give a tokenizer.json or .model"
        )
    if _TIKTOKEN_LINE.match(raw):
        remedy = "give the tokenizer.json of the same model"
        raise DataError(f"{where}: a tiktoken file, which lacks the word-splitting rule; {remedy}")
    if name.endswith(".json"):
        raise DataError(f"{where}: not a tokenizer.json (no JSON object)")
    # a tokenizer.json needs neither sentencepiece nor protobuf
    from fgpt.tokenizer.sentencepiece_model import SentencePieceTokenizer

    return SentencePieceTokenizer(raw, where, special_tokens, eod)


def find_tokenizer_file(folder: Path) -> Path:
    """Return the tokenizer's file in a directory, or the directory if it holds GPT-2's files.

    Raises DataError if there is no tokenizer or more than one.
    """
    files = sorted(folder.glob("*.model"))
    if (folder / hf_tokenizer.FILE_NAME).exists():
        files.insert(0, folder / hf_tokenizer.FILE_NAME)
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise DataError(f"{folder}: holds more than one tokenizer ({names}); name the file")
    if files:
        return files[0]
    if any((folder / vocabulary).exists() for vocabulary, _ in GPT2_FILES):
        return folder
    expected = f"{hf_tokenizer.FILE_NAME}, *.model, or vocab.json with merges.txt"
    raise DataError(f"{folder}: contains no tokenizer ({expected})")


def save_copy(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer with its end-of-document token, its treatment of special tokens and its
    `prompt_prefix`, so that `load_copy` gives the same one. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("tokenizer.*"):
        if old.name != tokenizer.file_name:
            old.unlink()
    tokenizer.save(folder)
    settings = {
        "eod": tokenizer.eod,
        "eod_id": tokenizer.eod_id,
        "sha256": tokenizer.fingerprint,
        "special_tokens": tokenizer.special_tokens,
        "prompt_prefix": list(tokenizer.prompt_prefix),
    }
    write_atomic(folder / COPY_SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())


def load_copy(folder: Path) -> Tokenizer:
    """Load what `save_copy` wrote. Raises DataError if it is damaged."""
    path = folder / COPY_SETTINGS
    try:
        settings = json.loads(path.read_text())
        tokenizer = load_tokenizer(folder, settings["special_tokens"], settings["eod"])
        is_same = (tokenizer.fingerprint, tokenizer.eod_id) == (
            settings["sha256"],
            settings["eod_id"],
        )
        # copies of earlier versions have none
        tokenizer.prompt_prefix = tuple(map(int, settings.get("prompt_prefix", ())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    if not is_same:
        raise DataError(f"{folder}: the tokenizer has changed since it was copied here")
    return tokenizer


def _read(file: Path) -> bytes:
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{file}: {size} bytes; a tokenizer has at most {MAX_FILE_BYTES}")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _convert_gpt2(folder: Path, eod: str | None) -> bytes:
    """Return the tokenizer.json equivalent to GPT-2's two files."""
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
