"""Which layers a pipeline stage holds: arithmetic on the layers' weights.

The layers are those of `GPT.layers()`: embedding, blocks, final norm, head. The embedding is always
in the first stage, norm and head in the last, and each stage has a block; so only blocks are
divided, and what the ends weigh is added to the first and to the last stage.
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
    """Name of each layer as an attribute of the GPT, in order."""
    blocks = [f"blocks.{i}" for i in range(config.n_layer)]
    return ["embedding", *blocks, "final_norm", "head"]


def layer_params(config: ModelConfig) -> list[int]:
    """Parameters of each layer; a tied head has its matrix, which its stage holds and computes."""
    matrix = config.vocab_size * config.d_model
    ends = [matrix + n_position_params(config), 0 if config.tied_head else matrix]
    blocks = [block_params(config)] * config.n_layer
    final_norm = n_params(config) - sum(ends) - sum(blocks)
    return [ends[0], *blocks, final_norm, matrix]


def layer_weights(config: ModelConfig, method: str) -> list[int]:
    """What each layer weighs by a method of `parallel.partition` other than blocks by hand."""
    if method == BY_PARAMETERS:
        return layer_params(config)
    classes = layer_classes(config)
    if method == BY_LAYERS:
        return [1] * len(classes)
    return [int(has_type(name, method)) for name in classes]


def stage_bounds(config: ModelConfig, pp: int, method: str) -> list[int]:
    """pp + 1 numbers: stage s holds the layers bounds[s] : bounds[s + 1].

    `method` is a checked `parallel.partition`. Raises ValueError if there are fewer blocks than
    stages.
    """
    by_hand = parse_blocks(method)
    if by_hand is not None:
        ends = list(accumulate(by_hand))
    else:
        embedding, *blocks, final_norm, head = layer_weights(config, method)
        ends = divide(blocks, pp, first=embedding, last=final_norm + head)
    return [0, *(end + 1 for end in ends[:-1]), config.n_layer + 3]


def divide(weights: Sequence[int], n_parts: int, *, first: int = 0, last: int = 0) -> list[int]:
    """Ends of `n_parts` runs of weights, none empty, whose heaviest is as light as can be.

    `first` and `last` are added to the first and to the last run. Of several such divisions: the
    one of least squares, then the one with the earliest ends. Raises ValueError if there are too
    few weights.
    """
    if not 1 <= n_parts <= len(weights):
        raise ValueError(f"{len(weights)} weights do not divide into {n_parts} parts")
    before = [0, *accumulate(weights)]

    def load(part: int, start: int, end: int) -> int:
        extra = (first if part == 0 else 0) + (last if part == n_parts - 1 else 0)
        return before[end] - before[start] + extra

    heaviest, _ = _cheapest(load, len(weights), n_parts, lambda w: w, max)
    _, ends = _cheapest(
        load, len(weights), n_parts, lambda w: w * w if w <= heaviest else None, operator.add
    )
    return list(ends)


def _cheapest(
    load: Callable[[int, int, int], int],
    n_weights: int,
    n_parts: int,
    cost: Callable[[int], int | None],
    join: Callable[[int, int], int],
) -> tuple[int, tuple[int, ...]]:
    """The least joint cost of all divisions, and the ends of the first division that has it.

    `cost` of a part that must not be is None.
    """
    # start -> the best division of what begins there into the parts after this one
    tails: dict[int, tuple[int, tuple[int, ...]]] = {n_weights: (0, ())}
    for part in reversed(range(n_parts)):
        longer = {}
        for start in range(n_weights):
            options = [
                (join(own, rest), (end, *ends))
                for end, (rest, ends) in tails.items()
                if end > start and (own := cost(load(part, start, end))) is not None
            ]
            if options:
                longer[start] = min(options)
        tails = longer
    return tails[0]
