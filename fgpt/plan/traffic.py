"""Bytes that a rank sends in one training step, from the configuration alone.

Tests compare it, to the byte, with `fgpt.distributed.traffic`, which counts what is sent. The
formulas are in fgpt/parallel/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fgpt.config.resolve import Resolved
from fgpt.config.shapes import Shapes
from fgpt.parallel.pipeline.partition import is_pipe_partitioned, layer_names, stage_bounds
from fgpt.parallel.tensor.sharding import full_shapes, is_qk_norm, local_config, shard_dim
from fgpt.parallel.topology import Grid, GridCoordinates


@dataclass(frozen=True)
class _Part:
    """What one rank computes with."""

    resolved: Resolved
    grid: Grid
    coordinates: GridCoordinates

    @property
    def tokens(self) -> int:
        """Of one micro-batch on this rank."""
        return self.resolved.batch.micro * self.resolved.seq_len // self.grid.cp

    @property
    def stream(self) -> int:
        """Bytes of the residual stream of one micro-batch, all tensor ranks' tokens."""
        return self.tokens * self.resolved.run.model.d_model * self.resolved.element_bytes

    @property
    def layers(self) -> list[str]:
        """This stage's layers."""
        run = self.resolved.run
        names = layer_names(run.model)
        if self.grid.pp == 1:
            return names
        bounds = stage_bounds(run.model, self.grid.pp, run.parallel.partition)
        return names[bounds[self.coordinates.pipe] : bounds[self.coordinates.pipe + 1]]

    @property
    def blocks(self) -> int:
        return sum(name.startswith("blocks.") for name in self.layers)

    @property
    def forwards(self) -> int:
        """Times that a block runs forward: once more where it is recomputed."""
        return 2 if "activation_checkpointing" in self.resolved.deepspeed else 1

    def parameters(self) -> dict[str, torch.Size]:
        """Whole shapes of this stage's parameters, without a tied head's copy."""
        shapes = full_shapes(self.resolved.run.model)
        here = tuple(f"{layer}." for layer in self.layers)
        return {name: shape for name, shape in shapes.items() if name.startswith(here)}


def sent_bytes(resolved: Resolved, coordinates: GridCoordinates) -> dict[str, int]:
    """Kind of group -> bytes that this rank sends in one step; `data` for ZeRO 0 to 2 in fp32
    only, where DeepSpeed's plan is simple.
    """
    part = _Part(resolved, Grid.of(resolved.batch), coordinates)
    accumulation = resolved.batch.accumulation
    sent = {
        "tensor": accumulation * _tensor(part),
        "context": accumulation * _context(part),
        "pipe": accumulation * _pipe(part) + _tied(part),
    }
    if resolved.precision == "fp32" and resolved.zero_stage < 3:
        sent["data"] = _data(part)
    return {kind: number for kind, number in sent.items() if number}


def _tensor(part: _Part) -> int:
    """Of one micro-batch."""
    tp, sequence = part.grid.tp, part.resolved.run.parallel.sequence
    if tp == 1:
        return 0
    first, last = "embedding" in part.layers, "head" in part.layers
    sums = part.blocks * (2 * part.forwards + 2) + first + last
    whole = sum(
        shape.numel()
        for name, shape in part.parameters().items()
        if shard_dim(name) is None and (sequence or is_qk_norm(name))
    )
    reduced = sums * part.stream + whole * part.resolved.element_bytes
    if last:
        reduced += 3 * 4 * part.tokens  # largest logit, sum of exponentials, target's logit
    # put together after sending
    between = (2 * (not last) + (not first)) if is_pipe_partitioned(part.resolved) else 0
    return (2 * reduced + between * part.stream) * (tp - 1) // tp


def _context(part: _Part) -> int:
    """Of one micro-batch: q, k, v and the result, there and back."""
    cp, config = part.grid.cp, local_config(part.resolved.run.model, part.grid.tp)
    shapes = Shapes.of(config)
    width = 2 * (shapes.n_head + shapes.n_kv_head) * shapes.d_head
    traded = part.tokens * width * part.resolved.element_bytes * (cp - 1) // cp
    return part.blocks * (part.forwards + 1) * traded


def _pipe(part: _Part) -> int:
    """Of one micro-batch: the stream to the next stage, its gradient to the one before."""
    neighbours = ("head" not in part.layers) + ("embedding" not in part.layers)
    divided = is_pipe_partitioned(part.resolved) or part.resolved.run.parallel.sequence
    return neighbours * part.stream // (part.grid.tp if divided else 1)


def _tied(part: _Part) -> int:
    """The float32 gradient of a tied head, summed over the first and the last stage; its new value
    from the first to the last, where there are replicas (see `PipeEngine`).
    """
    model = part.resolved.run.model
    ends = part.coordinates.pipe in (0, part.grid.pp - 1)
    if part.grid.pp == 1 or not model.tied_head or not ends:
        return 0
    told = part.grid.replicas > 1 and part.coordinates.pipe == 0
    size = local_config(model, part.grid.tp).vocab_size * model.d_model
    return size * (4 + told * part.resolved.element_bytes)


def _data(part: _Part) -> int:
    """Gradients summed (ZeRO-2: for each micro-batch), weights gathered (ZeRO 1 and 2)."""
    n, stage = part.grid.replicas, part.resolved.zero_stage
    local = full_shapes(local_config(part.resolved.run.model, part.grid.tp))
    held = sum(local[name].numel() for name in part.parameters())
    if part.grid.pp > 1 and part.resolved.run.model.tied_head and "head" in part.layers:
        held += local["embedding.token.weight"].numel()
    sums = part.resolved.batch.accumulation if stage == 2 else 1
    return 4 * held * (2 * sums + (stage > 0)) * (n - 1) // n
