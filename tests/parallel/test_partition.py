"""Pipeline partitions against brute force and against the layers of a real GPT."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpt.config.field_syntax import layer_classes
from fgpt.config.presets import PRESETS
from fgpt.config.schema import ModelConfig
from fgpt.model.gpt import GPT
from fgpt.parallel.pipeline.partition import (
    layer_names,
    layer_params,
    layer_weights,
    partition_balanced,
    stage_bounds,
)

SMALL = ModelConfig(vocab_size=96, max_seq_len=16, n_layer=5, d_model=16, n_head=2)
VARIANTS = {
    "gpt2": SMALL,
    "untied": replace(SMALL, tied_head=False),
    "post": replace(SMALL, norm_place="post", position="rotary"),
    "rms": replace(SMALL, norm="rmsnorm", activation="swiglu", bias=False),
}


def every_partition(n_weights: int, n_parts: int) -> list[list[int]]:
    """Ends of all partitions into non-empty parts, earliest first."""
    inner = combinations(range(1, n_weights), n_parts - 1)
    return [[*ends, n_weights] for ends in inner]


def loads(weights: list[int], ends: list[int], first: int, last: int) -> list[int]:
    starts = [0, *ends]
    parts = [sum(weights[a:b]) for a, b in zip(starts, ends, strict=False)]
    parts[0] += first
    parts[-1] += last
    return parts


weight = st.integers(0, 9)


@given(weights=st.lists(weight, min_size=1, max_size=8), first=weight, last=weight, data=st.data())
def test_no_partition_is_better(
    weights: list[int], first: int, last: int, data: st.DataObject
) -> None:
    n_parts = data.draw(st.integers(1, len(weights)))

    def badness(ends: list[int]) -> tuple[int, int, list[int]]:
        parts = loads(weights, ends, first, last)
        return max(parts), sum(part**2 for part in parts), ends

    best = min(every_partition(len(weights), n_parts), key=badness)
    assert partition_balanced(weights, n_parts, first=first, last=last) == best


@pytest.mark.parametrize("n_parts", [0, 4])
def test_too_few_weights(n_parts: int) -> None:
    with pytest.raises(ValueError, match=f"3 weights do not divide into {n_parts} parts"):
        partition_balanced([1, 1, 1], n_parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_the_models(variant: str) -> None:
    config = VARIANTS[variant]
    model = GPT(config)
    layers = model.layers()
    assert layer_names(config) == list(layers)
    assert layer_classes(config) == [type(layer).__name__ for layer in layers.values()]
    # a tied head is counted where it is computed, so parameters are counted layer by layer
    expected = [sum(p.numel() for p in layer.parameters()) for layer in layers.values()]
    expected[-1] = model.head.weight.numel()
    assert layer_params(config) == expected


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("uniform", [1] * 8),
        ("type:Block", [0, 1, 1, 1, 1, 1, 0, 0]),
        ("type:norm", [0, 0, 0, 0, 0, 0, 1, 0]),
        ("type:E", [1, 0, 0, 0, 0, 0, 1, 1]),
    ],
)
def test_weights(method: str, expected: list[int]) -> None:
    assert layer_weights(SMALL, method) == expected


@pytest.mark.parametrize(
    ("method", "pp", "expected"),
    [
        # 8 layers: embedding, 5 blocks, norm, head
        ("uniform", 1, [0, 8]),
        ("uniform", 2, [0, 4, 8]),
        ("type:Block", 2, [0, 3, 8]),
        ("3,2", 2, [0, 4, 8]),
        ("1, 4", 2, [0, 2, 8]),
        ("uniform", 5, [0, 2, 3, 4, 5, 8]),
        ("1,1,1,1,1", 5, [0, 2, 3, 4, 5, 8]),
        ("type:block", 3, [0, 2, 4, 8]),
    ],
)
def test_five_layers(method: str, pp: int, expected: list[int]) -> None:
    assert stage_bounds(SMALL, pp, method) == expected


def test_parameters_weigh_the_ends() -> None:
    """By hand: embedding 1536 + 256; a block 256 x 12 and 208 for biases and norms."""
    assert layer_params(SMALL) == [1792, *[3280] * 5, 32, 1536]
    # 3 blocks first: 11632 and 8128; 2 blocks first: 8352 and 11408, which is lighter
    assert stage_bounds(SMALL, 2, "parameters") == [0, 3, 8]
    # if the ends outweigh all blocks, the least squares leave each end one block
    wide = replace(SMALL, vocab_size=300_000, position="none", tied_head=False)
    assert stage_bounds(wide, 3, "parameters")[1:3] == [2, 5]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", ["parameters", "uniform", "type:Block"])
def test_each_stage_has_a_block(preset: str, method: str) -> None:
    config = PRESETS[preset]
    for pp in {1, 2, config.n_layer // 2, config.n_layer}:
        bounds = stage_bounds(config, pp, method)
        assert (bounds[0], bounds[-1], len(bounds)) == (0, config.n_layer + 3, pp + 1)
        inner = [1, *bounds[1:-1], config.n_layer + 1]
        assert all(a < b for a, b in zip(inner, inner[1:], strict=False))


def test_no_more_stages_than_blocks() -> None:
    with pytest.raises(ValueError, match="5 weights do not divide into 6"):
        stage_bounds(SMALL, 6, "uniform")
