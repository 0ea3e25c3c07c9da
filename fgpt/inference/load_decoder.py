"""From stored weights to a decoder: the whole model, or this rank's shard of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fgpt.checkpoint.boxes import Box
from fgpt.config.field_syntax import BY_PARAMETERS
from fgpt.config.schema import ModelConfig, Shapes
from fgpt.distributed.launch import GROUP_TIMEOUT, World
from fgpt.engine.speed import prefer_fast_attention
from fgpt.errors import LaunchError
from fgpt.inference.decoder import Decoder, make_decoder
from fgpt.inference.source import WeightSource
from fgpt.inference.weights import allocate_parameters, load_model
from fgpt.model.gpt import GPT
from fgpt.model.kernels.packed_linear import PackedProduct, packs
from fgpt.parallel.pipeline.partition import stage_bounds
from fgpt.parallel.tensor.local import local_config
from fgpt.parallel.tensor.parallelize import parallelize
from fgpt.parallel.tensor.sharding import shard_box
from fgpt.parallel.topology import Grid, ProcessGroups, make_process_groups

TIED_TO = "embedding.token.weight"
"""Logical name of a tied head's weight."""


def load_decoder(
    source: WeightSource,
    grid: Grid,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    *,
    pack: bool = True,
) -> Decoder:
    """Return the decoder of stored weights that all ranks can read; all call this together.

    `pack`: see `load_decoder_of`. Raises CheckpointError, and LaunchError for a grid that the model
    or the ranks do not fit.
    """
    check_grid(source.config, grid, world.size)
    groups = make_process_groups(grid, world.rank, GROUP_TIMEOUT) if world.size > 1 else None
    return load_decoder_of(source, groups, device, dtype, pack=pack)


def load_decoder_of(
    source: WeightSource,
    groups: ProcessGroups | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    pack: bool = True,
) -> Decoder:
    """Return the decoder of this rank's layers in these groups; None: of the whole model.

    It does not communicate, so that a rank may fail alone. `pack`: on a CPU, bring the weights into
    oneDNN's order; torch.compile cannot read them then. Raises CheckpointError.
    """
    prefer_fast_attention(device)
    if groups is None:
        layers = load_model(source, device, dtype).layers()
    else:
        layers = load_layers(source, groups, device, dtype)
    decoder = make_decoder(layers, source.config, device, dtype, groups)
    if device.type == "cpu" and pack and packs(dtype):
        pack_weights(layers.values())
    return decoder


def check_grid(config: ModelConfig, grid: Grid, n_ranks: int) -> None:
    """Raise LaunchError unless the model divides into the grid, and the grid has all ranks."""
    shapes = Shapes.of(config)
    if grid.size != n_ranks:
        fix = f"start torchrun --nproc-per-node {grid.size} -m fgpt.cli generate ..."
        if grid.size == 1:
            fix = f"give --tp {n_ranks}, or --pp {n_ranks}"
        raise LaunchError(
            f"--tp {grid.tp} x --pp {grid.pp} is for {grid.size}, and {n_ranks} run: {fix}"
        )
    split = {"query heads": shapes.n_head, "key/value heads": shapes.n_kv_head}
    split["MLP units"] = shapes.d_ff
    for what, number in split.items():
        if number % grid.tp:
            raise LaunchError(f"--tp {grid.tp}: does not divide the model's {number} {what}")
    if grid.pp > config.n_layer:
        raise LaunchError(
            f"--pp {grid.pp}: the model has {config.n_layer} blocks, at least one each"
        )


def load_layers(
    source: WeightSource, groups: ProcessGroups, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Return this rank's shard of its stage's layers, by name, in evaluation mode.

    No other weights are read, and none are ever in memory. Raises CheckpointError.
    """
    config, grid, here = source.config, groups.grid, groups.coordinates
    # 1. the layers of this stage, without memory for the others
    with torch.device("meta"):
        gpt = GPT(local_config(config, grid.tp)).to(dtype).requires_grad_(False)
    parallelize(gpt, config, groups, sequence=False, unfused=True)
    bounds = stage_bounds(config, grid.pp, BY_PARAMETERS)
    stage = slice(bounds[here.pipe], bounds[here.pipe + 1])
    layers = dict(list(gpt.layers().items())[stage])
    allocate_parameters(nn.ModuleList(layers.values()), device)
    # 2. this tensor rank's box of each parameter; rows beyond the vocabulary stay zero
    for layer_name, layer in layers.items():
        layer.eval()
        for own_name, parameter in layer.named_parameters():
            is_tied = config.tied_head and layer_name == "head"
            name = TIED_TO if is_tied else f"{layer_name}.{own_name}"
            offsets, sizes = shard_box(name, source.shapes[name], here.tensor, grid.tp)
            values = parameter.data.zero_()
            target = values[tuple(slice(size) for size in sizes)]
            source.copy(name, Box(offsets, sizes), target)
            parameter.requires_grad_(False)
    return layers


@torch.no_grad()
def pack_weights(layers: Iterable[nn.Module]) -> None:
    """Make every projection multiply copies of its weight, which is freed.

    A tied head's weight stays if the token embedding is among the layers.
    """
    modules: list[Any] = [module for layer in layers for module in layer.modules()]
    projections = [module for module in modules if hasattr(module, "project")]
    others = [module for module in modules if not hasattr(module, "project")]
    kept = {p for module in others for p in module.parameters(recurse=False)}
    for projection in projections:
        weight = projection.weight
        projection.project = PackedProduct(weight.detach())
        if weight not in kept:
            projection.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
