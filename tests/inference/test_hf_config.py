"""config.json is read as transformers reads it, and its values have the run file's ranges."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest

from fgpt.config.presets import PRESETS
from fgpt.errors import CheckpointError
from fgpt.inference.hf_config import from_hf_config

transformers = pytest.importorskip("transformers")

WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
WIDTHS |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 56, "vocab_size": 50}
SMALL: dict[str, dict[str, Any]] = {
    "llama": WIDTHS | {"model_type": "llama"},
    "qwen3": WIDTHS | {"model_type": "qwen3"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 50},
}
ABSENT = object()
DEFAULT = {"rope_type": "default"}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rotary_base(kind: str) -> None:
    """Wherever it is written, alone or several times, it is the one that transformers takes."""
    scaling = [{}, DEFAULT, {"rope_theta": 5}, {"type": "default", "rope_theta": 5e5}]
    scaling.append(DEFAULT | {"rope_theta": None})
    parameters = [{}, DEFAULT, DEFAULT | {"rope_theta": 3.5}]
    bases = set()
    for places in itertools.product(
        (ABSENT, None, 7, 0), (ABSENT, None, *scaling), (ABSENT, None, *parameters)
    ):
        keys = ("rope_theta", "rope_scaling", "rope_parameters")
        written = {k: v for k, v in zip(keys, places, strict=True) if v is not ABSENT}
        values = SMALL[kind] | copy.deepcopy(written)
        read = transformers.AutoConfig.for_model(**copy.deepcopy(values)).rope_parameters
        if read["rope_theta"]:
            assert from_hf_config(values, "x")[1].rotary_base == read["rope_theta"], written
            bases.add(read["rope_theta"])
        else:  # 0 or null, which gives no positions
            with pytest.raises(CheckpointError, match="rope_theta is"):
                from_hf_config(values, "x")
    assert bases == {10000.0, 7, 5, 5e5, 3.5}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_defaults(kind: str) -> None:
    """An absent key has transformers' value."""
    theirs = transformers.AutoConfig.for_model(kind)
    mine = from_hf_config({"model_type": kind}, "x")[1]
    assert (mine.n_layer, mine.d_model, mine.n_head, mine.vocab_size, mine.max_seq_len) == (
        theirs.num_hidden_layers,
        theirs.hidden_size,
        theirs.num_attention_heads,
        theirs.vocab_size,
        theirs.max_position_embeddings,
    )
    assert mine.tied_head == theirs.tie_word_embeddings
    if kind == "gpt2":
        assert (mine.d_ff, mine.norm_eps) == (4 * 768, theirs.layer_norm_epsilon)
    else:
        assert (mine.n_kv_head, mine.d_head) == (theirs.num_key_value_heads, theirs.head_dim)
        assert (mine.d_ff, mine.norm_eps) == (theirs.intermediate_size, theirs.rms_norm_eps)
        assert mine.rotary_base == theirs.rope_parameters["rope_theta"]


def test_qwen3_is_the_published_model() -> None:
    """The preset; the values are those of Qwen/Qwen3-0.6B's config.json."""
    published = {
        "model_type": "qwen3",
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    }
    preset = PRESETS["qwen3-0.6b"]
    assert replace(from_hf_config(published, "x")[1], preset=preset.preset) == preset


BAD: list[tuple[str, str, object]] = [
    *(("llama", "rms_norm_eps", value) for value in (0, -5, float("nan"), float("inf"), "x", [1])),
    *(("gpt2", "layer_norm_epsilon", value) for value in (0.0, 10**400, True)),
    *(("llama", "rope_theta", value) for value in (0, -1.0, "x", None)),
    *(("qwen3", "layer_types", value) for value in (5, "full_attention", ["sliding_attention"])),
    *(("llama", "rope_parameters", value) for value in (5, {"full_attention": DEFAULT})),
    *(("llama", "head_dim", value) for value in (15, 1, 0)),
    *(("llama", "num_key_value_heads", value) for value in (3, -2, 0, 10**30)),
    *(("gpt2", "n_embd", value) for value in (33, 2.5, True, "32", [32])),
    ("llama", "max_position_embeddings", 1),
    ("gpt2", "n_positions", 1),
    ("gpt2", "tie_word_embeddings", "no"),
    ("llama", "attention_bias", 1.5),
    ("llama", "initializer_range", -1),
    ("llama", "hidden_act", ["silu"]),
]


@pytest.mark.parametrize(("kind", "key", "value"), BAD)
def test_refused(kind: str, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^x: .*{key}") as error:
        from_hf_config(SMALL[kind] | {key: value}, "x")
    assert "\n" not in str(error.value)
