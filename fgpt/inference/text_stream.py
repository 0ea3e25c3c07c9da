"""Text from tokens as they come: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from fgpt.tokenizer.base import Tokenizer

REPLACEMENT = "\ufffd"
"""What decoders give for bytes that are not (yet) a character."""
N_CONTEXT = 8
"""Tokens of the prompt before the text: some tokenizers decode a first token differently."""


class TextStream:
    """The text of one row, token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        """`prompt`: the ids before the text; `stop`: strings before which it ends, none empty."""
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""
        """What has been returned so far."""
        self.stopped = False
        """Whether a stop string has come; the text ends before it."""
        # ids[:read] are decoded; ids[start:read] are the context in which the next ones are decoded
        self._ids = list(prompt)[-N_CONTEXT:]
        self._start, self._read = 0, len(self._ids)
        self._context = self._decode(self._read)
        self._held = ""  # decoded, and perhaps the begin of a stop string

    def add(self, token: int) -> str:
        """Return the text that is complete with this token, perhaps none."""
        self._ids.append(token)
        # 1. the new characters; incomplete ones wait for the next token
        decoded = self._decode(len(self._ids))
        if decoded.endswith(REPLACEMENT) or len(decoded) <= len(self._context):
            return ""
        piece = decoded[len(self._context) :]
        self._start, self._read = self._read, len(self._ids)
        self._context = self._decode(self._read)
        # 2. end before a stop string, or hold back what may become one
        return self._release(self._held + piece)

    def finish(self) -> str:
        """Return what was held back, without the bytes of a last character that is incomplete."""
        if self.stopped:
            return ""
        tail = self._decode(len(self._ids))[len(self._context) :].rstrip(REPLACEMENT)
        return self._release(self._held + tail, is_last=True)

    def _release(self, text: str, *, is_last: bool = False) -> str:
        """Return the part of a decoded text that may be shown; keep the rest."""
        begin = find_stop(text, self.stop)
        n_held = 0
        if begin is not None:
            self.stopped = True
            text = text[:begin]
        elif not is_last:
            n_held = max((_overlap(text, stop) for stop in self.stop), default=0)
        shown, self._held = text[: len(text) - n_held], text[len(text) - n_held :]
        self.text += shown
        return shown

    def _decode(self, end: int) -> str:
        return self.tokenizer.decode(self._ids[self._start : end])


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return the begin of the stop string that is complete first, the longest of several; None:
    the text has none. It does not depend on how the text came in pieces.
    """
    places = [(at + len(each), at) for each in stop if (at := text.find(each)) >= 0]
    return min(places)[1] if places else None


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
