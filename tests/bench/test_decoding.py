"""The comparison of decoding with transformers, on a small model."""

from __future__ import annotations

from dataclasses import replace
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
    found = decoding.compare(theirs, decoder, 2)  # raises AssertionError if the tokens differ
    assert set(found) == {"ours", "transformers"}
    assert all(prefill_s > 0 for prefill_s, _ in found.values())
    decoder.config = replace(decoder.config, max_seq_len=66)  # ours then ends after two tokens
    with pytest.raises(AssertionError, match="the texts differ"):
        decoding.compare(theirs, decoder, 2)
