"""Find and read a tokenizer: a file, or the one in a directory."""

from __future__ import annotations

from pathlib import Path

from fgpt.data.tokenizer import jsonfile, sentence
from fgpt.data.tokenizer.base import Tokenizer
from fgpt.data.tokenizer.jsonfile import JsonTokenizer
from fgpt.data.tokenizer.sentence import SentencePieceTokenizer
from fgpt.data.tokenizer.spec import SpecialTokens
from fgpt.errors import DataError

FILE_NAMES = (jsonfile.FILE_NAME, sentence.FILE_NAME)


def load_tokenizer(
    path: str | Path, special_tokens: SpecialTokens = "text", eod: str | None = None
) -> Tokenizer:
    """Load a tokenizer.json, a SentencePiece .model, or the one in a directory.

    Raises DataError naming the file.
    """
    file = tokenizer_file(Path(path)) if Path(path).is_dir() else Path(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return from_bytes(raw, file.name, str(file), special_tokens, eod)


def from_bytes(
    raw: bytes,
    name: str,
    where: str,
    special_tokens: SpecialTokens = "text",
    eod: str | None = None,
) -> Tokenizer:
    """Read a tokenizer's bytes; `name` is its file's name, `where` is named in errors."""
    kind = SentencePieceTokenizer if name.endswith(".model") else JsonTokenizer
    return kind(raw, where, special_tokens, eod)


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer's file in a directory (a data set holds one)."""
    found = [folder / name for name in FILE_NAMES if (folder / name).exists()]
    return found[0] if found else folder / FILE_NAMES[0]
