"""What a tokenizer is learned from is bounded, and comes from everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fgpt.tokenizer import TokenizerSpec, train, train_sentencepiece, train_tokenizer
from fgpt.tokenizer.sampling import chunks, spread
from fgpt.tokenizer.spec import Kind
from tests.tokenizer.chinese import documents


def test_chunks_join_to_the_text() -> None:
    for text in ("", "a", "\n" * 5000, "x" * 3500, "".join(documents(40)), "a" * 1000 + "\nb"):
        parts = list(chunks(text, 1000))
        assert "".join(parts) == text
        assert all(0 < len(part) <= 1000 for part in parts)
        assert all(part.endswith("\n") for part in parts[:-1] if "\n" in part)


def test_spread_keeps_its_limit_and_takes_from_everywhere() -> None:
    items = [f"{i:06d}" for i in range(100_000)]
    kept = spread(items, 60_000, len)
    assert 5_000 <= len(kept) <= 10_000
    assert kept == sorted(kept) == spread(iter(items), 60_000, len)
    per_tenth = np.histogram([int(item) for item in kept], bins=10, range=(0, 100_000))[0]
    assert per_tenth.min() > 0.8 * per_tenth.mean()
    assert spread(items[:10], 60, len) == items[:10]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece-bpe"])
def test_learning_takes_a_bounded_part(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a fifth of the text, the tokenizer is that of the part which spread draws."""
    texts = [*documents(100), "\u0416\u0436 x\n" * 3000]
    spec = TokenizerSpec(500, kind=kind)
    whole = train_tokenizer(spec, texts).fingerprint
    drawn: list[list[str]] = []

    def noted(*args: Any) -> list[str]:
        drawn.append(spread(*args))
        return drawn[-1]

    for module in (train, train_sentencepiece):
        monkeypatch.setattr(module, "CHUNK_CHARS", 500)
        monkeypatch.setattr(module, "spread", noted)
    monkeypatch.setattr(train, "LEARN_COST", 10 * 20_000)
    monkeypatch.setitem(train_sentencepiece.LEARN_BYTES, kind, 20_000)
    part = train_tokenizer(spec, iter(texts)).fingerprint
    assert 10_000 < sum(len(text.encode()) for text in drawn[0]) < 25_000
    assert part != whole and part == train_tokenizer(spec, drawn[0]).fingerprint
