"""FGPT's shards read by Megatron-LM, and Megatron-LM's shards read by FGPT."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from fgpt.data.shards import IndexedTokens
from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare.combine import import_shards
from fgpt.prepare.shard_writer import ShardWriter
from tests.prepare import megatron

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None,
        reason="megatron-core is not installed (it is in requirements-dev.txt)",
    ),
    pytest.mark.timeout(120),
]

# documents of one sequence, of several, and empty ones
DOCUMENTS = [[[7, 8, 9, 0]], [[5, 6], [1, 2, 3], [0]], [[399, 0]], [], [[4] * 500, [0]]]


def test_megatron_reads_what_prepare_wrote(prepared: TokenDataset) -> None:
    for name, tokens in (("train", prepared.train), ("valid", prepared.valid)):
        found = megatron.read(prepared.path / name)
        ours = [tokens.document(i).tolist() for i in range(tokens.document_count)]
        assert found["sequences"] == ours
        assert found["documents"] == list(range(len(ours) + 1))
        assert found["dtype"] == tokens.dtype.name


def test_megatron_reads_ids_of_32_bits(tmp_path: Path) -> None:
    documents = [np.array([70_000, 5]), np.array([1]), np.arange(99_000, 99_900)]
    with ShardWriter(tmp_path / "x", 100_000) as writer:
        for ids in documents:
            writer.add(ids)
        writer.close()
    found = megatron.read(tmp_path / "x")
    assert found["dtype"] == "int32"
    assert found["sequences"] == [ids.tolist() for ids in documents]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_what_megatron_wrote(tmp_path: Path, dtype: type[np.integer]) -> None:
    tokens = IndexedTokens(megatron.write(tmp_path / "m", DOCUMENTS, dtype))
    assert tokens.dtype == np.dtype(dtype)
    assert tokens.document_count == len(DOCUMENTS)
    for i, sequences in enumerate(DOCUMENTS):
        assert tokens.document(i).tolist() == [id for sequence in sequences for id in sequence]


def test_training_data_from_megatrons_shards(tmp_path: Path, prepared: TokenDataset) -> None:
    ids = [prepared.train.document(i).tolist() for i in range(30)]
    prefix = megatron.write(tmp_path / "m", [[d[:3], d[3:]] for d in ids], np.int32)
    place = str(prepared.path)
    card = import_shards({"train": prefix}, prepared.tokenizer, place, tmp_path / "out")
    done = open_token_dataset(tmp_path / "out", verify=True)
    assert done.card == card and card.dtype == "uint16"
    both = [
        s.document(i).tolist() for s in (done.train, done.valid) for i in range(s.document_count)
    ]
    assert sorted(both) == sorted(ids)
    assert done.valid.document_count >= 1


def test_ids_beyond_the_tokenizer_are_refused(tmp_path: Path, prepared: TokenDataset) -> None:
    prefix = megatron.write(tmp_path / "m", [[[1, 2, 400]], [[3]]], np.int32)
    with pytest.raises(DataError, match="m.bin: id 400 is outside 0..399"):
        import_shards({"train": prefix}, prepared.tokenizer, str(prepared.path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
