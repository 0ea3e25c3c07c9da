"""Communication of a step that nothing hides: between tensor-, context- and data-parallel ranks and
pipeline stages. Times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from fgpt.config.schema import Shapes
from fgpt.model.count import block_params
from fgpt.plan.cluster import Cluster
from fgpt.plan.collectives import Group, send_time
from fgpt.plan.efficiency import Efficiency
from fgpt.plan.kernels import PassTimes
from fgpt.plan.planned_run import PlannedRun

ZERO_3_NETWORK_SHARE = 0.1
"""Of a ring's bandwidth between nodes that DeepSpeed's ZeRO-3 reaches, gathering parameter by
parameter. Rough: three runs on V100 with Omni-Path (bigscience-gpt2-v100, quality C, in no error
statistic) suggest 0.03 to 0.12, table 2 of Narayanan et al. 2021 (A100, InfiniBand) about 0.09."""
BUCKET_BYTES = 500e6
"""Of one data-parallel message (DeepSpeed's `reduce_bucket_size` in 16 bits is larger)."""


@dataclass(frozen=True)
class Window:
    """Kernels of one micro-batch on a stage, behind which collectives can hide."""

    forward: float
    backward: float
    """With recomputation."""
    n_blocks: int


def tensor_sum(run: PlannedRun, cluster: Cluster, constants: Efficiency) -> float:
    """Seconds of one sum of a micro-batch's residual stream that nothing hides: an all-reduce, or
    with sequence parallelism a reduce-scatter and an all-gather.
    """
    if run.tp == 1:
        return 0.0
    stream = run.micro_tokens * run.model.d_model * run.element_bytes
    seconds = Group.of(cluster, constants, run.tp).all_reduce(stream)
    if run.engine == "deepspeed" and run.model.attention == "reference":
        seconds += constants.sync_us * 1e-6
    if run.sequence and run.is_transformer_engine:
        seconds *= 1 - constants.tensor_overlap
    return seconds


def context_block(
    run: PlannedRun, cluster: Cluster, constants: Efficiency, block: PassTimes
) -> float:
    """Seconds of one block's communication that nothing hides.

    DeepSpeed exchanges heads for tokens and waits (Ulysses); Megatron passes keys and values
    around a ring, behind the attention to those it has.
    """
    if run.cp == 1:
        return 0.0
    shapes = Shapes.of(run.model)
    group = Group.of(cluster, constants, run.cp, run.tp)
    passes = 3 if run.recompute == "full" else 2
    if run.engine == "deepspeed":
        width = 2 * (shapes.n_head + shapes.n_kv_head) * shapes.d_head / run.tp
        return passes * group.all_to_all(run.micro_tokens * width * run.element_bytes)
    width = 2 * max(shapes.n_kv_head // run.tp, 1) * shapes.d_head
    around = group.all_gather(run.cp * run.micro_tokens * width * run.element_bytes)
    forward = max(around - block.forward.attention, 0.0)
    backward = max(2 * around - block.backward.attention, 0.0)  # and their gradients
    return (passes - 1) * forward + backward


def stage_send(run: PlannedRun, cluster: Cluster, constants: Efficiency) -> float:
    """Seconds of a micro-batch's activations to the next stage, and of their gradients back.

    A rank sends its part of the residual stream; without sequence parallelism the tensor-parallel
    ranks then gather it in their node.
    """
    if run.pp == 1:
        return 0.0
    stream = run.micro_tokens * run.model.d_model * run.element_bytes
    distance = run.tp * run.cp * run.dp
    seconds = send_time(cluster, constants, stream / run.tp, distance, run.ranks)
    if run.tp > 1 and not run.sequence:
        seconds += Group.of(cluster, constants, run.tp).all_gather(stream)
    hidden = 0.5 if run.is_transformer_engine and run.interleave > 1 else 0.0
    return 2 * seconds * (1 - hidden)


def stage_params(run: PlannedRun, n_blocks: int) -> float:
    """Parameters of one rank of a stage of so many blocks; the embedding or the head is on one of
    them, and decides where it is not small.
    """
    blocks = n_blocks * block_params(run.model)
    ends = run.model.vocab_size * run.model.d_model
    if run.pp == 1 and not run.model.tied_head:
        ends *= 2
    return (blocks + ends) / run.tp


def data_communication(
    run: PlannedRun,
    cluster: Cluster,
    constants: Efficiency,
    params: float,
    window: Window,
) -> float:
    """Seconds of a step in which gradients or weights travel and nothing is computed; `params`: of
    this rank, before they are sharded.
    """
    if run.replicas == 1:
        return 0.0
    if run.zero_stage == 3:
        return _sharded_weights(run, cluster, constants, params, window)
    shards = min(run.n_shards, run.replicas) if run.zero_stage else run.replicas
    group = Group.of(cluster, constants, run.replicas, run.tp)
    inner = Group.of(cluster, constants, shards, run.tp)
    reduced, gathered = run.reduced_bytes * params, run.element_bytes * params
    messages = max(reduced / BUCKET_BYTES, 1.0)
    # 1. gradients: where nothing shards them, and in DeepSpeed's ZeRO-1, an all-reduce
    is_scattered = run.zero_stage > 0 and run.engine == "megatron" and shards == run.replicas
    reduce = (group.all_gather if is_scattered else group.all_reduce)(reduced, messages)
    reduce *= run.accumulation if run.zero_stage == 2 else 1
    # 2. weights that were updated in parts
    gather = inner.all_gather(gathered, messages) if run.zero_stage else 0.0
    # 3. Megatron and FSDP overlap the first with the last backward pass, the second with the first
    # forward pass; a DeepSpeed pipeline reduces after it
    if run.engine == "deepspeed" or run.model.attention == "reference":
        return reduce + gather
    # passes; with an interleaved pipeline, those of the last (first) micro-batch on each stage
    passes = min(run.pp, run.accumulation) if run.interleave > 1 else 1
    hidden = min(reduce, passes * window.backward) + min(gather, passes * window.forward)
    moved = reduced * (1 if is_scattered else 2) + gathered * (run.zero_stage > 0)
    return reduce + gather - hidden + _disturbance(cluster, constants, moved)


def _sharded_weights(
    run: PlannedRun, cluster: Cluster, constants: Efficiency, params: float, window: Window
) -> float:
    """ZeRO-3 and FSDP: blocks gather weights in both passes and scatter gradients, each
    micro-batch; with hybrid sharding, replicas of the shards then sum them.
    """
    shards = min(run.n_shards, run.replicas)
    inner = Group.of(cluster, constants, shards, run.tp)
    messages = window.n_blocks + 2
    gather = inner.all_gather(run.element_bytes * params, messages)
    reduce = inner.all_gather(run.reduced_bytes * params, messages)
    if run.engine == "deepspeed" and shards * run.tp > cluster.gpus_per_node:
        gather, reduce = gather / ZERO_3_NETWORK_SHARE, reduce / ZERO_3_NETWORK_SHARE
    copies = run.replicas // shards
    if copies > 1:
        outer = Group.of(cluster, constants, copies, run.tp * shards)
        reduce += outer.all_reduce(run.reduced_bytes * params / shards, messages)
    hidden = min(gather, window.forward) + min(gather + reduce, window.backward)
    # the first gather and the last scatter of a step have nothing to hide behind
    ends = (gather + reduce) / messages
    moved = (2 * run.element_bytes + run.reduced_bytes) * params * (shards - 1) / shards
    lost = _disturbance(cluster, constants, moved)
    return run.accumulation * (2 * gather + reduce - hidden + lost) + ends


def _disturbance(cluster: Cluster, constants: Efficiency, n_bytes: float) -> float:
    """Seconds that kernels lose to collectives beside them, which take multiprocessors and memory
    bandwidth for each byte, however slow the network is.
    """
    link = cluster.device.link_gb_s * 1e9 * constants.link
    return constants.data_interference * n_bytes / link
