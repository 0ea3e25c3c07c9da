"""The comparison of decoding with transformers, on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fgpt.distributed.launch import World
from fgpt.parallel.topology import Grid


def test_both_sides_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from fgpt.bench import decoding
    from fgpt.inference.load_decoder import load_decoder
    from fgpt.inference.weights import open_weights

    torch.manual_seed(0)
    monkeypatch.setattr(decoding, "TURNS", 1)
    monkeypatch.setattr(decoding, "NEW_TOKENS", 4)
    shape = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    theirs.save_pretrained(tmp_path)
    source = open_weights(tmp_path)
    decoder = load_decoder(source, Grid(), World(), torch.device("cpu"), torch.float32)
    found = decoding.compare(theirs, decoder, 2)
    assert set(found) == {"ours", "transformers"}
    assert all(prefill_s > 0 and rate > 0 for prefill_s, rate in found.values())
