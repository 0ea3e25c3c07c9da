"""Weights by logical names: whole tensors, boxes, models and tokenizers of every source."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fgpt.checkpoint.boxes import Box
from fgpt.convert.export import export
from fgpt.data.token_dataset import open_token_dataset
from fgpt.errors import CheckpointError, DataError
from fgpt.inference.source import WeightSource
from fgpt.inference.weights import load_model, load_tokenizer_for, open_weights
from fgpt.model.gpt import GPT
from fgpt.tokenizer.load import save_copy
from tests.convert.models import KINDS, randomize, save_random, small_config


@pytest.fixture(params=list(KINDS))
def sources(tmp_path: Path, request: pytest.FixtureRequest) -> list[WeightSource]:
    """One model as a checkpoint and as a directory of Hugging Face."""
    kv = {} if request.param == "gpt2" else {"n_kv_head": 2}
    run = save_random(tmp_path / "run", small_config(request.param, tied_head=False, **kv))
    (tmp_path / "hf").mkdir()
    source = open_weights(run)
    export(source, tmp_path / "hf", torch.float32, None)
    return [source, open_weights(tmp_path / "hf")]


def test_boxes(sources: list[WeightSource]) -> None:
    """Any box of any tensor, in any dtype, is that part of the whole one."""
    first, second = sources
    assert dict(first.shapes) == dict(second.shapes) and set(first.names()) == set(second.names())
    assert all(source.shapes is source.shapes for source in sources)  # callers loop over names
    generator = torch.Generator().manual_seed(3)
    for name, shape in first.shapes.items():
        whole = first.read(name)
        assert tuple(whole.shape) == shape and torch.equal(whole, second.read(name))
        for dtype in (torch.float32, torch.bfloat16):
            begins = [int(torch.randint(n, (1,), generator=generator)) for n in shape]
            sizes = tuple(
                1 + int(torch.randint(n - b, (1,), generator=generator))
                for n, b in zip(shape, begins, strict=True)
            )
            box = Box(tuple(begins), sizes)
            expected = whole[tuple(map(slice, box.offsets, box.ends))].to(dtype)
            for source in sources:
                target = torch.full(sizes, torch.nan, dtype=dtype)
                source.copy(name, box, target)
                assert torch.equal(target, expected), name


def test_unknown_names(sources: list[WeightSource]) -> None:
    for source in sources:
        with pytest.raises(CheckpointError, match=r"blocks\.7"):
            source.read("blocks.7.mlp.up.weight")
        with pytest.raises(CheckpointError, match=r"blocks\.7"):
            source.copy("blocks.7.mlp.up.weight", Box((0, 0), (1, 1)), torch.empty(1, 1))


@pytest.mark.parametrize("tied", [True, False])
def test_model(tmp_path: Path, tied: bool) -> None:
    """The model that was saved; a tied head stays one parameter."""
    config = small_config(tied_head=tied)
    expected = GPT(config)
    randomize(expected)
    source = open_weights(save_random(tmp_path / "run", config))
    model = load_model(source, "cpu", torch.float32)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert (model.head.weight is model.embedding.token.weight) is tied
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    half = load_model(source, "cpu", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(torch.arange(8)[None]).dtype == torch.bfloat16


def test_a_file_that_is_cut(tmp_path: Path) -> None:
    """Sizes are compared when it is opened; nothing is hashed."""
    run = save_random(tmp_path / "run", small_config())
    (file,) = run.glob("checkpoints/step_*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="the manifest says"):
        open_weights(run)


def test_tokenizers(tmp_path: Path, small_data: Path) -> None:
    """Its own copy, a prepared data set, a file; not one with too many ids."""
    run = save_random(tmp_path / "run", small_config())
    source, own = open_weights(run), open_token_dataset(small_data).tokenizer
    with pytest.raises(CheckpointError, match="--tokenizer"):
        load_tokenizer_for(source)
    save_copy(own, tmp_path / "copy")
    for path in (small_data, tmp_path / "copy", small_data / "tokenizer.json"):
        assert load_tokenizer_for(source, path).fingerprint == own.fingerprint
    shutil.copytree(tmp_path / "copy", run / "tokenizer")
    assert load_tokenizer_for(source).eod_id == own.eod_id
    (run / "tokenizer" / "tokenizer.json").write_text(own.raw.decode() + "\n")
    with pytest.raises(DataError, match="has changed"):
        load_tokenizer_for(source)
    narrow = open_weights(save_random(tmp_path / "narrow", small_config(vocab_size=300)))
    with pytest.raises(CheckpointError, match="400 ids, the model 300 rows"):
        load_tokenizer_for(narrow, small_data)
