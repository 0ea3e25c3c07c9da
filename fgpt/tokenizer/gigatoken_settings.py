"""What gigatoken is told of a tokenizer: a tokenizer.json, and names for characters.

It remembers SentencePiece text by words, which it cuts at blanks and before . , " ) ; : ! ? where
no piece goes across. In code, ( _ and line ends come more often than ; ! ?, so the two change names
in the vocabulary, and in every text: the same pieces and the same ids, from shorter words, of which
more are known (a third less time).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.errors import NoFastEncoder, refusals
from fgpt.tokenizer.hf_tokenizer import JsonTokenizer

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_BLANK = "\u2581"
_NAMES = str.maketrans("(_\n;!?", ";!?(_\n")
_BYTE_NAMES = bytes.maketrans(b"(_\n;!?", b";!?(_\n")
_KEEPS_NAMES = (
    {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK},
    {"type": "Prepend", "prepend": _BLANK},
)
"""Steps of a normalizer that do the same whatever the characters are called."""


@dataclass(frozen=True)
class GigaSettings:
    """A tokenizer for gigatoken; picklable."""

    json: str
    """A tokenizer.json that it takes."""
    names: bytes | None
    """The byte, of 256, that stands for each in a text; None: every byte for itself."""

    @property
    def name(self) -> str:
        """The encoder's name and version."""
        return f"gigatoken {version('gigatoken')}"


def giga_settings(tokenizer: Tokenizer) -> GigaSettings:
    """Settings for `tokenizer`; where special tokens are text, without them.

    Raises NoFastEncoder.
    """
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        fix = "pip install gigatoken makes encoding many times faster"
        raise NoFastEncoder(f"gigatoken is not installed ({error}); {fix}") from error
    with refusals(f"gigatoken cannot read this {tokenizer.kind}"):
        settings = _settings(tokenizer)
        names = _BYTE_NAMES if _may_rename(settings) else None
        return GigaSettings(json.dumps(_renamed(settings) if names else settings), names)


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, JsonTokenizer):
        settings = dict(tokenizer.settings)
    else:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        settings = json.loads(sentencepiece_to_tokenizer_json(tokenizer.raw))
    added = settings.get("added_tokens") or []
    special = {token["content"] for token in added if token.get("special")}
    if not isinstance(tokenizer, JsonTokenizer):  # the converter makes merges for every piece
        model = settings["model"]
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in special]
    if tokenizer.special_tokens == "text":
        settings["added_tokens"] = [token for token in added if token["content"] not in special]
    return settings


def _may_rename(settings: dict[str, Any]) -> bool:
    """Whether this is SentencePiece's BPE, where nothing but the vocabulary knows characters."""
    normalizer = settings.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    is_plain = not settings.get("pre_tokenizer") and all(step in _KEEPS_NAMES for step in steps)
    return is_plain and bool(settings["model"].get("byte_fallback"))


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for texts whose characters have their other names."""
    model = settings["model"]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    names = {piece: _name(piece) for piece in model["vocab"]}
    changed = {
        "vocab": {names[piece]: i for piece, i in model["vocab"].items()},
        "merges": [[names[part] for part in pair] for pair in pairs],
        "unk_token": names.get(model.get("unk_token")),
    }
    added = settings.get("added_tokens") or []
    tokens = [token | {"content": token["content"].translate(_NAMES)} for token in added]
    return settings | {"model": model | changed, "added_tokens": tokens}


def _name(piece: str) -> str:
    """A piece by its other name; that of a byte, such as <0x0A>, by the byte's."""
    byte = _BYTE.fullmatch(piece)
    return f"<0x{_BYTE_NAMES[int(byte[1], 16)]:02X}>" if byte else piece.translate(_NAMES)
