"""Best-fit samples: each token of an epoch once, from few groups at a time, a pure function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fgpt.data import best_fit
from fgpt.data.best_fit import BestFitSamples
from fgpt.data.samples import StreamSamples, TokenRanges, split_at_documents
from fgpt.data.shards import IndexedTokens
from tests.data.numbered import numbered, random_lengths


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 16 samples, pools of 4: many of both in a small split."""
    monkeypatch.setattr(best_fit, "GROUP_SAMPLES", 16)
    monkeypatch.setattr(best_fit, "POOL_GROUPS", 4)


@pytest.mark.parametrize("seed", range(12))
def test_every_epoch_reads_every_token_once(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    seq_len = int(draw.integers(2, 20))
    lengths = random_lengths(seed, int(draw.integers(30, 900)), 2 + 3 * seed)
    tokens = numbered(tmp_path, lengths)
    samples, stream = (kind(tokens, seq_len, seed=seed) for kind in (BestFitSamples, StreamSamples))
    assert samples.samples_per_epoch == stream.samples_per_epoch == sum(lengths) // seq_len - 1
    for epoch in range(3):
        numbers = np.arange(samples.samples_per_epoch) + epoch * samples.samples_per_epoch
        rows = samples.batch(numbers)
        assert (
            rows.inputs.shape == (samples.samples_per_epoch, seq_len)
            and rows.document_begins is None
        )
        assert np.array_equal(rows.targets, rows.inputs + 1)  # the true successors
        assert np.array_equal(
            np.sort(rows.inputs, axis=None), np.sort(stream.batch(numbers).inputs, axis=None)
        )


def test_a_pure_function_of_seed_and_number(tmp_path: Path) -> None:
    tokens = numbered(tmp_path, random_lengths(1, 700, 9))
    whole = BestFitSamples(tokens, 8, seed=5, mark_documents=True).batch(np.arange(1500))
    again = BestFitSamples(tokens, 8, seed=5, mark_documents=True)
    for g in np.random.default_rng(0).permutation(1500)[:300].tolist():
        for one, all_ in zip(again.batch(np.array([g])), whole, strict=True):
            assert one is not None and all_ is not None
            assert np.array_equal(one[0], all_[g])
    other = BestFitSamples(tokens, 8, seed=6).batch(np.arange(1500)).inputs
    assert (other[:, 0] != whole.inputs[:, 0]).mean() > 0.9


def test_epochs_differ_in_cut_and_order(tmp_path: Path) -> None:
    samples = BestFitSamples(numbered(tmp_path, random_lengths(2, 900, 9)), 32, seed=5)
    n = samples.samples_per_epoch
    first, second = (samples.batch(np.arange(n) + epoch * n).inputs for epoch in (0, 1))
    assert (first[:, 0] != second[:, 0]).mean() > 0.9
    rows = {tuple(row) for row in first.tolist()}
    assert sum(tuple(row) in rows for row in second.tolist()) < n / 2


def test_a_stretch_of_samples_needs_few_packings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = BestFitSamples(numbered(tmp_path, random_lengths(3, 3000, 9)), 8, seed=5)
    done: list[tuple[int, int]] = []
    pack = samples._pack
    monkeypatch.setattr(
        samples, "_cached_pack", best_fit.lru_cache(8)(lambda *at: done.append(at) or pack(*at))
    )
    for g in range(samples.samples_per_epoch):
        samples.locate(np.array([g]))
    assert len(done) == len(set(done)) == samples.groups  # each group of the epoch once
    order = [group for _, group in done]
    assert order != sorted(order)


@pytest.mark.parametrize("short", [0, 1, 15])
@pytest.mark.parametrize("groups", [0, 1, 5, 6, 9])
def test_places_of_an_epoch(tmp_path: Path, short: int, groups: int) -> None:
    """Each sample of each group occurs once; the short group can be anywhere in the stream."""
    n = 16 * groups + short
    if n == 0:
        return
    begins = set()
    for seed in range(20):
        samples = BestFitSamples(numbered(tmp_path, [1] * 7 * (n + 1)), 7, seed=seed)
        assert (samples.full_groups, samples.short_group) == (groups, short)
        found = zip(*(x.tolist() for x in samples._shuffle(0, np.arange(n))), strict=True)
        rows = [(g, r) for g in range(groups + 1) for r in range(16 if g < groups else short)]
        assert sorted(found) == rows
        begins.add(int(samples._pack(0, groups).starts.min()) if short else 0)
    assert len(begins) > 7 or not short or not groups


def test_documents_begin_where_the_index_says(tmp_path: Path) -> None:
    lengths = random_lengths(4, 300, 6)
    tokens = numbered(tmp_path, lengths)
    edges = set(np.cumsum(lengths).tolist())
    for kind in (StreamSamples, BestFitSamples):
        rows = kind(tokens, 16, seed=1, mark_documents=True).batch(np.arange(150))
        assert rows.document_begins is not None
        for inputs, begins in zip(rows.inputs.tolist(), rows.document_begins.tolist(), strict=True):
            expected = 0
            for column, token in enumerate(inputs):
                jump = column > 0 and token != inputs[column - 1] + 1
                expected = column if jump or token in edges else expected
                assert begins[column] == expected


def test_a_document_of_several_sequences_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Megatron's index may have, with empty sequences and an empty document."""
    tokens = object.__new__(IndexedTokens)
    tokens.dtype = np.dtype("<u2")
    tokens.lengths = np.array([3, 2, 0, 4, 0, 5], dtype="<i4")
    tokens.pointers = 2 * (np.cumsum(tokens.lengths) - tokens.lengths)
    monkeypatch.setattr(tokens, "check_size", lambda: None)  # there is no file
    tokens.documents = np.array([0, 2, 2, 3, 5, 6])  # documents of 5, 0, 0, 4 and 5 tokens
    found = split_at_documents(tokens, TokenRanges(np.array([0, 4, 9]), np.array([14, 6, 2])))
    pieces = [p for p in zip(found.starts.tolist(), found.lengths.tolist(), strict=True) if p[1]]
    assert pieces == [(0, 5), (5, 4), (9, 5), (4, 1), (5, 4), (9, 1), (9, 2)]
