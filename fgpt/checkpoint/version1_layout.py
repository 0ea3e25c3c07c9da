"""Where each parameter is in the flat tensors of DeepSpeed's optimizers, computed without them.

    ZeRO-1/2       a group's parameters one after the other, cut into one equal part per replica
    ZeRO-3         each parameter cut into one equal part per replica; the parts of a group's
                   parameters one after the other
    without ZeRO   each parameter, or a group's parameters one after the other

The groups are those of `fgpt.optim.build.parameter_groups`; ZeRO-3 divides them into sub-groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from fgpt.config.schema import ModelConfig
from fgpt.engine.state import Fragment, Shard
from fgpt.errors import CheckpointError
from fgpt.model.gpt import GPT
from fgpt.optim.build import has_weight_decay
from fgpt.parallel.pipeline.partition import stage_bounds
from fgpt.parallel.tensor.local import local_config
from fgpt.parallel.tensor.sharding import shard_box, shard_dim
from fgpt.parallel.topology import Grid


class Parameter(NamedTuple):
    """A parameter of one pipeline stage and tensor rank."""

    name: str
    """Logical name."""
    deepspeed_name: str
    """Its name in DeepSpeed's module."""
    layer: int
    """Index of its layer in `GPT.layers()`."""
    name_in_layer: str
    """Its name in that layer."""
    shape: tuple[int, ...]
    """Of this tensor rank's shard, padding included."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Piece(NamedTuple):
    """The elements [begin, end) of a flattened parameter, at `offset` of a flat tensor."""

    parameter: Parameter
    begin: int
    end: int
    offset: int


def rank_parameters(
    config: ModelConfig, grid: Grid, partition: str, stage: int
) -> dict[str, Parameter]:
    """DeepSpeed name -> parameter of a tensor rank of a stage, in the order of `named_parameters`.

    `partition`: the run's parallel.partition. ValueError if it does not fit the model.
    """
    with torch.device("meta"):
        gpt = GPT(local_config(config, grid.tp))
    names = {parameter: name for name, parameter in gpt.named_parameters()}
    layers = list(gpt.layers().items())
    bounds = stage_bounds(config, grid.pp, partition) if grid.pp > 1 else [0, len(layers)]
    tied = ("embedding", "head") if config.tied_head and grid.pp > 1 else ()
    # a stage registers tied layers before the others
    own = sorted(range(bounds[stage], bounds[stage + 1]), key=lambda i: layers[i][0] not in tied)
    parameters: dict[str, Parameter] = {}
    for i in own:
        layer, module = layers[i]
        prefix = "tied_modules.embedding" if layer in tied else str(i)
        for local, parameter in module.named_parameters():
            name = names[parameter]
            deepspeed_name = f"{prefix}.{local}" if grid.pp > 1 else name
            # without a pipeline, a tied head has the embedding's parameter
            parameters.setdefault(
                deepspeed_name, Parameter(name, deepspeed_name, i, local, tuple(parameter.shape))
            )
    return parameters


def parameter_groups(
    parameters: Mapping[str, Parameter], in_file: Sequence[Mapping[str, Sequence[int]]] | None
) -> list[list[Parameter]]:
    """The parameters of each group of the optimizer: of each sub-group with ZeRO-3.

    `in_file`: DeepSpeed's own list, name -> shape, which the files of ZeRO 1 to 3 have. Raises
    CheckpointError if it is not of these parameters.
    """
    if in_file is None:
        groups: list[list[Parameter]] = [[], []]
        for name, parameter in parameters.items():
            groups[not has_weight_decay(name, len(parameter.shape))].append(parameter)
        return [group for group in groups if group]
    shapes = {name: tuple(shape) for group in in_file for name, shape in group.items()}
    if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
        raise CheckpointError("its parameters are not those of the model in its configuration")
    return [[parameters[name] for name in group] for group in in_file]


def partition_pieces(
    groups: Sequence[Sequence[Parameter]],
    paddings: Sequence[Sequence[int]] | None,
    replica: int,
    replicas: int,
) -> list[list[Piece]]:
    """ZeRO-1/2 and BF16_Optimizer: what is in a replica's partition of each group.

    `groups`: in DeepSpeed's order, which round_robin_gradients changes. `paddings`: elements after
    each parameter.
    """
    tensors = []
    for i, group in enumerate(groups):
        padding = paddings[i] if paddings is not None else [0] * len(group)
        sizes = [p.size + pad for p, pad in zip(group, padding, strict=True)]
        *offsets, total = accumulate(sizes, initial=0)
        size = 2 * -(-total // (2 * replicas))  # NCCL needs an even number of 16-bit elements
        first = size * replica
        pieces = []
        for parameter, offset in zip(group, offsets, strict=True):
            begin = max(first - offset, 0)
            end = min(first + size - offset, parameter.size)
            if begin < end:
                pieces.append(Piece(parameter, begin, end, offset + begin - first))
        tensors.append(pieces)
    return tensors


def shard_pieces(
    groups: Sequence[Sequence[Parameter]], replica: int = 0, replicas: int = 1
) -> list[list[Piece]]:
    """ZeRO-3: what is in a replica's flat tensor of each sub-group. With one replica: a group's
    parameters one after the other.
    """
    tensors = []
    for group in groups:
        pieces, offset = [], 0
        for parameter in group:
            size = -(-parameter.size // replicas)
            begin = min(size * replica, parameter.size)
            pieces.append(Piece(parameter, begin, min(begin + size, parameter.size), offset))
            offset += size
        tensors.append(pieces)
    return tensors


def fragments_of(
    pieces: Sequence[Piece],
    shapes: Mapping[str, Sequence[int]],
    stage: int,
    tensor: int,
    grid: Grid,
) -> Iterator[Fragment]:
    """The fragments of a flat tensor of this stage and tensor rank, padding left out.

    `shapes`: of the full parameters. Copies are written once: tensor rank 0 writes what all have,
    the first stage the weight of a tied head.
    """
    for parameter, begin, end, offset in pieces:
        name = parameter.name
        shard = Shard(name, tuple(shapes[name]), *shard_box(name, shapes[name], tensor, grid.tp))
        end = min(end, math.prod(shard.sizes))
        if begin < end:
            is_copy = stage > 0 and name.startswith("embedding.")
            is_copy |= tensor > 0 and shard_dim(name) is None
            yield Fragment(shard, begin, end, offset, not is_copy)
