"""Training samples are bounded and come from all of the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fgpt.tokenizer import train
from fgpt.tokenizer.spec import Kind, TokenizerSpec
from fgpt.tokenizer.train import sample_chunks, split_into_chunks, train_tokenizer
from tests.tokenizer.chinese import documents


def test_chunks_join_to_the_text() -> None:
    for text in ("", "a", "\n" * 5000, "x" * 3500, "".join(documents(40)), "a" * 1000 + "\nb"):
        chunks = list(split_into_chunks(text, 1000))
        assert "".join(chunks) == text
        assert all(0 < len(chunk) <= 1000 for chunk in chunks)
        assert all(chunk.endswith("\n") for chunk in chunks[:-1] if "\n" in chunk)


def test_a_sample_keeps_its_limit_and_comes_from_everywhere() -> None:
    items = [f"{i:06d}" for i in range(100_000)]
    kept = sample_chunks(items, 6, 60_000, len)
    assert 5_000 <= len(kept) <= 10_000
    assert kept == sorted(kept) == sample_chunks(iter(items), 6, 60_000, len)
    per_tenth = np.histogram([int(item) for item in kept], bins=10, range=(0, 100_000))[0]
    assert per_tenth.min() > 0.8 * per_tenth.mean()
    assert sample_chunks(items[:10], 6, 60, len) == items[:10]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece-bpe"])
def test_training_uses_a_bounded_sample(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of a fifth of the text, the tokenizer is that of the sample."""
    texts = [*documents(100), "\u0416\u0436 x\n" * 3000]
    spec = TokenizerSpec(500, kind=kind)
    whole = train_tokenizer(spec, texts).fingerprint
    drawn: list[list[str]] = []

    def noted(*args: Any) -> list[str]:
        drawn.append(sample_chunks(*args))
        return drawn[-1]

    monkeypatch.setattr(train, "BPE_CHUNK_CHARS", 500)
    monkeypatch.setattr(train, "SENTENCEPIECE_CHUNK_CHARS", 500)
    monkeypatch.setattr(train, "sample_chunks", noted)
    monkeypatch.setattr(train, "BPE_SAMPLE_COST", 10 * 20_000)
    monkeypatch.setitem(train.SENTENCEPIECE_SAMPLE_BYTES, kind, 20_000)
    sampled = train_tokenizer(spec, iter(texts)).fingerprint
    assert 10_000 < sum(len(text.encode()) for text in drawn[0]) < 25_000
    assert sampled != whole and sampled == train_tokenizer(spec, drawn[0]).fingerprint
