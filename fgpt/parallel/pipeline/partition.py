"""Which layers each pipeline stage holds: arithmetic on the layers' weights.

The layers are those of `GPT.layers()`: embedding, blocks, final norm, head. The embedding is in the
first stage, norm and head are in the last, and each stage has at least one block. So only blocks
are divided; the weight of the other layers is added to the first and the last stage.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import accumulate

from fgpt.config.field_syntax import (
    BY_LAYERS,
    BY_PARAMETERS,
    has_type,
    layer_classes,
    parse_blocks,
)
from fgpt.config.schema import ModelConfig
from fgpt.model.count import block_params, n_params, n_position_params


def layer_names(config: ModelConfig) -> list[str]:
    """Names of the layers, in the order of `GPT.layers()`."""
    blocks = [f"blocks.{i}" for i in range(config.n_layer)]
    return ["embedding", *blocks, "final_norm", "head"]


def layer_params(config: ModelConfig) -> list[int]:
    """Parameters of each layer; a tied head counts its matrix, which its stage holds too."""
    matrix = config.vocab_size * config.d_model
    ends = [matrix + n_position_params(config), 0 if config.tied_head else matrix]
    blocks = [block_params(config)] * config.n_layer
    final_norm = n_params(config) - sum(ends) - sum(blocks)
    return [ends[0], *blocks, final_norm, matrix]


def layer_weights(config: ModelConfig, method: str) -> list[int]:
    """Weight of each layer by a `parallel.partition` method, unless it lists the blocks."""
    if method == BY_PARAMETERS:
        return layer_params(config)
    classes = layer_classes(config)
    if method == BY_LAYERS:
        return [1] * len(classes)
    return [int(has_type(name, method)) for name in classes]


def stage_bounds(config: ModelConfig, pp: int, method: str) -> list[int]:
    """Return pp + 1 bounds: stage s holds the layers bounds[s] : bounds[s + 1].

    `method`: a validated `parallel.partition`. Raises ValueError if there are fewer blocks than
    stages.
    """
    by_hand = parse_blocks(method)
    if by_hand is not None:
        ends = list(accumulate(by_hand))
    else:
        embedding, *blocks, final_norm, head = layer_weights(config, method)
        ends = partition_balanced(blocks, pp, first=embedding, last=final_norm + head)
    return [0, *(end + 1 for end in ends[:-1]), config.n_layer + 3]


def partition_balanced(
    weights: Sequence[int], n_parts: int, *, first: int = 0, last: int = 0
) -> list[int]:
    """Return the ends of `n_parts` consecutive non-empty parts, the heaviest as light as possible.

    `first` and `last` are added to the first and the last part. Ties: the least sum of squares,
    then the earliest ends. Raises ValueError if there are fewer weights than parts.
    """
    if not 1 <= n_parts <= len(weights):
        raise ValueError(f"{len(weights)} weights do not divide into {n_parts} parts")
    prefix_sums = [0, *accumulate(weights)]

    def load(part: int, start: int, end: int) -> int:
        extra = (first if part == 0 else 0) + (last if part == n_parts - 1 else 0)
        return prefix_sums[end] - prefix_sums[start] + extra

    # 1. the least possible maximum
    heaviest, _ = _best_partition(load, len(weights), n_parts, lambda w: w, max)
    # 2. the least sum of squares among partitions with that maximum
    _, ends = _best_partition(
        load, len(weights), n_parts, lambda w: w * w if w <= heaviest else None, operator.add
    )
    return list(ends)


def _best_partition(
    load: Callable[[int, int, int], int],
    n_weights: int,
    n_parts: int,
    cost: Callable[[int], int | None],
    combine: Callable[[int, int], int],
) -> tuple[int, tuple[int, ...]]:
    """Dynamic programming: return the least combined cost of all partitions, and the ends of the
    first partition that has it. `cost(load)` is None for a part that is not allowed.
    """
    # best[start]: (cost, ends) of the best partition of weights start.. into the parts so far
    best: dict[int, tuple[int, tuple[int, ...]]] = {n_weights: (0, ())}
    # from the last part to the first, prepend one part start:end to each known partition of end..
    for part in reversed(range(n_parts)):
        longer = {}
        for start in range(n_weights):
            options = [
                (combine(part_cost, rest_cost), (end, *ends))
                for end, (rest_cost, ends) in best.items()
                if end > start and (part_cost := cost(load(part, start, end))) is not None
            ]
            if options:
                longer[start] = min(options)
        best = longer
    return best[0]
