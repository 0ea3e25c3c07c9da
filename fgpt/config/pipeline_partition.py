"""What `parallel.partition` may say, and the layers that it speaks of."""

from __future__ import annotations

from typing import Any

from fgpt.config.schema import ModelConfig

BY_PARAMETERS, BY_LAYERS = "parameters", "uniform"
BY_TYPE = "type:"
"""Followed by a part of a layer's class name."""


def layer_classes(model: ModelConfig) -> list[str]:
    """Class name of each layer of the GPT, in order."""
    norm = "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"
    final_norm = norm if model.norm_place == "pre" else "Identity"
    return ["InputEmbedding", *["Block"] * model.n_layer, final_norm, "Head"]


def has_type(layer_class: str, partition: str) -> bool:
    """Whether a layer is of the type in `type:NAME`; case does not matter."""
    return partition.removeprefix(BY_TYPE).strip().lower() in layer_class.lower()


def blocks_as_text(value: list[Any]) -> str | None:
    """ "3,2" for [3, 2]; None for anything but whole numbers."""
    if any(type(blocks) is not int for blocks in value):
        return None
    return ",".join(map(str, value))


def blocks_by_hand(partition: str) -> list[int] | None:
    """Blocks of each stage, [3, 2] for "3,2"; None if that is not what the text says."""
    parts = [part.strip() for part in partition.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        return None
    return [int(part) for part in parts]
