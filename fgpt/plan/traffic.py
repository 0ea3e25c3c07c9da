"""Bytes that a rank sends in one training step, computed from the configuration.

Tests compare them, to the byte, with the counts of `fgpt.distributed.traffic`. The formulas are in
fgpt/parallel/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fgpt.config.resolve import Resolved
from fgpt.config.schema import Shapes
from fgpt.optim.optimizers import is_matrix
from fgpt.parallel.matrices import Matrix, plan_rounds, sent_elements
from fgpt.parallel.pipeline.partition import layer_names, stage_bounds
from fgpt.parallel.tensor.local import local_config
from fgpt.parallel.tensor.sharding import full_shapes, is_qk_norm, shard_dim
from fgpt.parallel.topology import Grid, GridCoordinates

DEEPSPEED_ALIGNMENT = 2
"""ZeRO pads the parameters of a group to a multiple of this on each rank."""


@dataclass(frozen=True)
class _Rank:
    """One rank's share of the model and of the micro-batch."""

    resolved: Resolved
    grid: Grid
    coordinates: GridCoordinates

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on this rank."""
        return self.resolved.batch.micro * self.resolved.seq_len // self.grid.cp

    @property
    def stream(self) -> int:
        """Bytes of one micro-batch's residual stream, over all tensor-parallel ranks."""
        return self.tokens * self.resolved.run.model.d_model * self.resolved.element_bytes

    @property
    def layers(self) -> list[str]:
        """Names of this stage's layers."""
        run = self.resolved.run
        names = layer_names(run.model)
        if self.grid.pp == 1:
            return names
        bounds = stage_bounds(run.model, self.grid.pp, run.parallel.partition)
        return names[bounds[self.coordinates.pipe] : bounds[self.coordinates.pipe + 1]]

    @property
    def n_blocks(self) -> int:
        return sum(name.startswith("blocks.") for name in self.layers)

    @property
    def forward_passes(self) -> int:
        """Forward passes of a block per micro-batch: two where it is recomputed."""
        return 1 if self.resolved.settings.checkpointing is None else 2

    def parameters(self) -> dict[str, torch.Size]:
        """Full shapes of this stage's parameters, without a tied head's copy."""
        shapes = full_shapes(self.resolved.run.model)
        prefixes = tuple(f"{layer}." for layer in self.layers)
        return {name: shape for name, shape in shapes.items() if name.startswith(prefixes)}


def sent_bytes(resolved: Resolved, coordinates: GridCoordinates) -> dict[str, int]:
    """Bytes that this rank sends in one step, by kind of process group.

    `data` is missing for ZeRO-3 and for 16 bits, where DeepSpeed's schedule is not modelled.
    """
    rank = _Rank(resolved, Grid.of(resolved.batch), coordinates)
    accumulation = resolved.batch.accumulation
    sent = {
        "tensor": accumulation * _tensor(rank),
        "context": accumulation * _context(rank),
        "pipe": accumulation * _pipe(rank) + _tied(rank),
    }
    if resolved.precision == "fp32" and resolved.zero_stage < 3:
        sent["data"] = _data(rank)
    for kind, n_bytes in _matrices(rank).items():
        if kind in sent:
            sent[kind] += n_bytes
    return {kind: number for kind, number in sent.items() if number}


def _tensor(rank: _Rank) -> int:
    """Bytes of one micro-batch."""
    tp, sequence = rank.grid.tp, rank.resolved.run.parallel.sequence
    if tp == 1:
        return 0
    has_embedding, has_head = "embedding" in rank.layers, "head" in rank.layers
    sums = rank.n_blocks * (2 * rank.forward_passes + 2) + has_embedding + has_head
    replicated = sum(
        shape.numel()
        for name, shape in rank.parameters().items()
        if shard_dim(name) is None and (sequence or is_qk_norm(name))
    )
    reduced = sums * rank.stream + replicated * rank.resolved.element_bytes
    if has_head:
        reduced += 3 * 4 * rank.tokens  # maximum, sum of exponentials, target logit
    # all-gathers of what a neighbouring stage sent in parts
    gathers = 2 * (not has_head) + (not has_embedding)
    between = gathers if rank.resolved.is_pipe_partitioned else 0
    return (2 * reduced + between * rank.stream) * (tp - 1) // tp


def _context(rank: _Rank) -> int:
    """Bytes of one micro-batch: all-to-alls of q, k, v, the output, and their gradients."""
    cp, config = rank.grid.cp, local_config(rank.resolved.run.model, rank.grid.tp)
    shapes = Shapes.of(config)
    width = 2 * (shapes.n_head + shapes.n_kv_head) * shapes.d_head
    exchanged = rank.tokens * width * rank.resolved.element_bytes * (cp - 1) // cp
    return rank.n_blocks * (rank.forward_passes + 1) * exchanged


def _pipe(rank: _Rank) -> int:
    """Bytes of one micro-batch: activations to the next stage, gradients to the previous one."""
    neighbours = ("head" not in rank.layers) + ("embedding" not in rank.layers)
    divided = rank.resolved.is_pipe_partitioned or rank.resolved.run.parallel.sequence
    return neighbours * rank.stream // (rank.grid.tp if divided else 1)


def _tied(rank: _Rank) -> int:
    """Bytes of one step for a tied head: its fp32 gradient, summed over the first and last stage,
    and with replicas its new value from the first to the last (see `PipeEngine`).
    """
    model = rank.resolved.run.model
    is_end = rank.coordinates.pipe in (0, rank.grid.pp - 1)
    if rank.grid.pp == 1 or not model.tied_head or not is_end:
        return 0
    sends_value = rank.grid.replicas > 1 and rank.coordinates.pipe == 0
    size = local_config(model, rank.grid.tp).vocab_size * model.d_model
    return size * (4 + sends_value * rank.resolved.element_bytes)


def _data(rank: _Rank) -> int:
    """Bytes of one step: gradient sums (ZeRO-2: each micro-batch), gathers (ZeRO 1 and 2)."""
    n, stage = rank.grid.replicas, rank.resolved.zero_stage
    local = full_shapes(local_config(rank.resolved.run.model, rank.grid.tp))
    n_params = sum(local[name].numel() for name in rank.parameters())
    if rank.grid.pp > 1 and rank.resolved.run.model.tied_head and "head" in rank.layers:
        n_params += local["embedding.token.weight"].numel()
    sums = rank.resolved.batch.accumulation if stage == 2 else 1
    return 4 * n_params * (2 * sums + (stage > 0)) * (n - 1) // n


def _matrices(rank: _Rank) -> dict[str, int]:
    """Bytes of one step of Muon, by kind of group: ranges of matrices to their owners and back."""
    optimizer = rank.resolved.settings.optimizer
    stage, grid, here = rank.resolved.zero_stage, rank.grid, rank.coordinates
    if optimizer is None or not optimizer.is_own or stage == 3:
        return {}
    replicas = grid.replicas if stage > 0 else 1
    # 1. the matrices of this stage, in the order of the optimizer
    shapes = {n: s for n, s in rank.parameters().items() if is_matrix(n, len(s))}
    if rank.resolved.engine_settings.get("zero_optimization.round_robin_gradients"):
        names = list(shapes)
        shapes = {name: shapes[name] for r in range(replicas) for name in names[r::replicas]}
    # 2. what each rank keeps: without ZeRO all of its shards, else a part of all, one after another
    total = sum(shape.numel() for shape in shapes.values()) // grid.tp
    alignment = DEEPSPEED_ALIGNMENT * replicas
    part = -(-total // alignment) * alignment // replicas
    matrices, first = [], 0
    for name, shape in shapes.items():
        size = shape.numel() // grid.tp
        ranges = [
            (max(r * part - first, 0), min((r + 1) * part - first, size)) for r in range(replicas)
        ]
        kept = tuple(pair if pair[0] < pair[1] else (0, 0) for pair in ranges)
        matrices.append(Matrix(name, tuple(shape), tuple(p for p in kept for _ in range(grid.tp))))
        first += size
    # 3. what this rank sends
    n_ranks = replicas * grid.tp
    replica = here.data * grid.cp + here.context if stage > 0 else 0
    sent = sent_elements(plan_rounds(matrices, n_ranks), replica * grid.tp + here.tensor)
    # `MatrixUpdate.momentum_dtype`
    is_gram = rank.resolved.settings.optimizer_params.get("ns_method") == "gram"
    is_wide = is_gram or rank.resolved.precision == "fp16"
    size = 4 if is_wide else rank.resolved.element_bytes
    return {"data" if replicas > 1 else "tensor": sent * size}
