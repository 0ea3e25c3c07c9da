"""`fgpt bench data`: pipeline and baseline write equal bytes; the records hold the measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fgpt.bench.data import encode
from fgpt.bench.data.draw import write_synthetic_shard
from fgpt.bench.data.encode import peak_rss_bytes
from fgpt.cli.bench_data import bench_data_verb
from fgpt.data.shards import IndexedTokens, ShardInfo
from fgpt.errors import DataError
from fgpt.prepare.shard_writer import ShardWriter
from fgpt.tokenizer.load import load_tokenizer
from tests.prepare.corpora import write_corpus


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    texts = write_corpus(tmp_path / "texts")
    sizes = ["--vocab_size", "400", "--rounds", "2", "--workers", "1"]
    large = ["--tokens", "1000000", "--seq_len", "64", "--samples", "2000"]
    places = ["--tmp", str(tmp_path), "--out", str(tmp_path / "data.jsonl")]
    return ["--input", str(texts), *sizes, *large, *places]


def test_records(command: list[str], tmp_path: Path) -> None:
    assert bench_data_verb(command) == 0
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()
    ]
    kinds = [record["kind"] for record in records if record["measurement"] == "encode"]
    assert kinds == ["bpe", "sentencepiece-unigram", "sentencepiece-bpe"]
    for record in records:
        assert record["commit"] and record["hardware"] and record["versions"]
    for record in records[:3]:
        assert len(record["pipeline_s"]) == len(record["plain_s"]) == 2
        assert len(record["fastest_s"]) == (0 if record["kind"] == "bpe" else 2)
        assert 0 < min(record["in_encoder"]) <= max(record["in_encoder"]) <= 1
        assert record["documents"] == 80 and record["peak_rss_mb"] > 10
    draws = {record["way"] for record in records if record["measurement"] == "draw"}
    assert draws == {"stream", "blend", "best_fit"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "texts"]


def _with_another_id(shard: Path) -> ShardInfo:
    """Raise the 100th id of a shard by 1, and write it anew."""
    tokens, written = IndexedTokens(shard), ShardWriter(shard.with_name("changed"), 400)
    ids = np.concatenate([tokens.document(i) for i in range(tokens.document_count)])
    ids[100] += 1
    with written as writer:
        writer.extend(ids.astype(tokens.dtype), tokens.lengths)
        info = writer.close()
    for suffix in (".bin", ".idx"):
        shard.with_name("changed" + suffix).replace(shard.with_name(shard.name + suffix))
    return info


def test_differing_ids_are_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = encode.prepare_baseline

    def changed(*args: Any) -> Any:
        shards = baseline(*args)
        return shards | {"train": _with_another_id(args[-1] / "train")}

    monkeypatch.setattr(encode, "prepare_baseline", changed)
    with pytest.raises(DataError, match="bpe-0-fast and bpe-0-lists differ") as raised:
        bench_data_verb([*command, "--kinds", "bpe"])
    [saved] = tmp_path.glob("differs-*")
    assert str(saved) in str(raised.value)
    facts = json.loads((saved / "difference.json").read_text())
    text = (saved / "document.txt").read_text()
    assert facts["split"] == "train"
    assert f"document {facts['document']} ({facts['source']})" in str(raised.value)
    assert (tmp_path / "texts" / facts["source"]).read_text() == text
    ours, theirs = (np.load(saved / f"ids_{name}.npy") for name in ("first", "second"))
    assert np.flatnonzero(ours != theirs).tolist() == [facts["token"]]
    tokenizer = load_tokenizer(saved)
    assert [*tokenizer.encode(text), tokenizer.eod_id] == ours.tolist()


def test_differing_documents_are_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = encode.prepare_baseline

    def changed(*args: Any) -> Any:
        (tmp_path / "texts" / "new.txt").write_text("not there before")
        return baseline(*args) | {"train": None}

    monkeypatch.setattr(encode, "prepare_baseline", changed)
    with pytest.raises(DataError, match="texts changed during the measurement: run again"):
        bench_data_verb([*command, "--kinds", "bpe"])


def test_synthetic_shard(tmp_path: Path) -> None:
    documents = write_synthetic_shard(tmp_path / "x", 10**7, 1000)
    tokens = IndexedTokens(tmp_path / "x")
    assert tokens.tokens == 10**7
    assert tokens.document_count == documents
    assert 8_000 < documents < 12_000
    assert np.median(tokens.lengths) == pytest.approx(693, rel=0.1)
    assert (tmp_path / "x.bin").stat().st_blocks < 100


def test_peak_memory_counts_children() -> None:
    child = "x = bytearray(200_000_000); import time; time.sleep(0.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    peak = peak_rss_bytes(subprocess.Popen([sys.executable, "-c", code]))
    assert 200e6 < peak < 400e6
