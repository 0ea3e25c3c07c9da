"""Peak memory of one rank of a planned run, term by term, from shapes alone.

Tensors follow from what an engine keeps; what torch's counters do not show (the CUDA context,
NCCL's buffers, segments that the caching allocator cannot reuse) from the few numbers of
allowances.json, which says what they were fitted on. `fgpt.plan.judge_memory` compares the sum with
published runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fgpt.model.count import block_params
from fgpt.plan.activation_memory import (
    block_memory,
    chunks_in_flight,
    embedding_memory,
    loss_memory,
    pipe_buffer_bytes,
)
from fgpt.plan.cluster import Cluster
from fgpt.plan.planned_run import PlannedRun
from fgpt.plan.shapes_of_rank import StageShapes, distinct_stages, stage_shapes
from fgpt.plan.state_memory import planned_states

ALLOWANCES = Path(__file__).with_name("allowances.json")
GIB, MIB = 2**30, 2**20
BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size` and `allgather_bucket_size`, by default."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`, by default."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. All ranks of a pipeline stage need the same."""

    stage: int
    weights: int
    gradients: int
    master_weights: int
    """The optimizer's fp32 copy."""
    optimizer: int
    """Its states."""
    buckets: int
    """Tensors of collectives: DeepSpeed's buckets, FSDP's gathered units."""
    activations: int
    """Of all micro-batches in flight, with the pipeline's buffers."""
    recomputed: int
    """Of the block that is computed again."""
    logits: int
    """The loss: logits, their fp32 copy and gradient."""
    step: int
    """Of the optimizer's step only, in which no activations live: a tensor for each parameter,"""
    flat_step: int
    """and flat tensors."""
    workspace: int
    """Of matrix products."""
    context: int
    """CUDA context and kernels, outside torch's counters."""
    nccl: int
    """Buffers of NCCL's communicators, outside torch's counters."""
    fragmentation: int
    """What torch's allocator holds beyond the tensors."""
    host: int
    """Offloaded to host memory."""

    @property
    def lasting(self) -> int:
        """Tensors of the whole run."""
        states = self.weights + self.gradients + self.master_weights + self.optimizer
        return states + self.buckets + self.workspace

    @property
    def backward(self) -> int:
        """Tensors of the fullest moment of forward and backward passes, beside the lasting ones.

        The loss is over when the first block is computed again.
        """
        return self.activations + max(self.recomputed, self.logits)

    @property
    def allocated(self) -> int:
        """As torch.cuda.max_memory_allocated shows it."""
        return self.lasting + max(self.backward, self.step + self.flat_step)

    @property
    def unshared(self) -> int:
        """Bytes of the segments of torch's allocator: flat tensors of the step do not fit into
        those that activations leave.
        """
        return self.lasting + max(self.backward, self.step) + self.flat_step

    def terms(self) -> dict[str, int]:
        """Name -> bytes of each part of `device_total`, at the fullest moment."""
        lasting = ("weights", "gradients", "master_weights", "optimizer", "buckets", "workspace")
        in_step = self.step > self.backward
        last = "recomputed" if self.recomputed > self.logits else "logits"
        moment = ("step",) if in_step else ("activations", last)
        names = (*lasting, *moment, "flat_step", "context", "nccl")
        return {name: getattr(self, name) for name in names}

    @property
    def reserved(self) -> int:
        """As torch.cuda.max_memory_reserved shows it."""
        return self.unshared + self.fragmentation

    @property
    def reserved_or_smi(self) -> int:
        """As nvidia-smi shows it."""
        return self.reserved + self.context + self.nccl

    @property
    def device_total(self) -> int:
        """What must fit into the device: as nvidia-smi shows it, without the segments that torch's
        allocator returns before it fails.
        """
        return self.unshared + self.context + self.nccl


@dataclass(frozen=True)
class Fit:
    """Whether the fullest rank of a run fits into its device."""

    stage: int
    predicted_gib: float
    """What must fit (`RankMemory.device_total`)."""
    device_gib: float

    @property
    def margin_gib(self) -> float:
        """What is left; negative where the run does not fit."""
        return self.device_gib - self.predicted_gib

    @property
    def is_possible(self) -> bool:
        return self.margin_gib >= 0


def rank_memory(run: PlannedRun, cluster: Cluster, stage: int) -> RankMemory:
    """Return the memory of the ranks of one pipeline stage.

    Raises ValueError if the model has fewer blocks than the pipeline has stages.
    """
    shapes, states, known = stage_shapes(run, stage), planned_states(run), _allowances()
    in_flight = chunks_in_flight(run, stage)
    activations = _activations(run, shapes, in_flight)
    loss = loss_memory(run) if shapes.has_head else None
    logits = loss.kept + loss.temporary if loss else 0
    recomputed = block_memory(run).recomputed if shapes.n_blocks else 0
    params = shapes.params
    step = params * states.step
    if run.kernels == "fgpt" and run.pp > 1:
        step += _reduce_buffers(run)
    fragmentation = known["fragmentation_share"] * (activations + max(recomputed, logits))
    return RankMemory(
        stage=stage,
        weights=int(params * states.weights),
        gradients=int(params * states.gradients),
        master_weights=int(params * states.master),
        optimizer=int(params * states.optimizer),
        buckets=_buckets(run, shapes),
        activations=activations,
        recomputed=recomputed,
        logits=logits,
        step=int(step),
        flat_step=int(params * states.flat_step),
        workspace=int(known["workspace_mib"] * MIB),
        context=int(known["context_gib"] * GIB),
        nccl=int(_nccl_gib(run, cluster, known) * GIB),
        fragmentation=int(fragmentation + params * states.freed),
        host=int(params * states.host),
    )


def worst_stage(run: PlannedRun, cluster: Cluster) -> RankMemory:
    """Return the memory of the fullest pipeline stage."""
    return max(
        (rank_memory(run, cluster, stage) for stage in distinct_stages(run)),
        key=lambda memory: memory.device_total,
    )


def fits(run: PlannedRun, cluster: Cluster) -> Fit:
    """Compare the fullest stage with the device."""
    worst = worst_stage(run, cluster)
    return Fit(worst.stage, worst.device_total / GIB, cluster.device.memory_gib)


def interval(predicted: float) -> tuple[float, float]:
    """Return (low, high), between which nine of ten held-out measurements are."""
    low, high = _allowances()["interval"]
    return predicted * low, predicted * high


def fitted_sets() -> frozenset[str]:
    """Names of the sets of published runs that numbers of allowances.json were fitted on."""
    return frozenset(_allowances()["fitted_on"])


def _activations(run: PlannedRun, shapes: StageShapes, in_flight: int) -> int:
    blocks = shapes.n_blocks / run.interleave * in_flight
    kept = blocks * block_memory(run).kept
    micro_batches = -(-in_flight // run.interleave)
    if shapes.has_embedding:
        kept += micro_batches * embedding_memory(run)
    return int(kept) + pipe_buffer_bytes(run, shapes, micro_batches)


def _buckets(run: PlannedRun, shapes: StageShapes) -> int:
    unit = block_params(shapes.local)
    if run.engine == "fsdp":
        # two blocks gathered in 16 bits, one block's gradients; the root unit (embedding, head)
        # stays gathered
        ends = shapes.params - shapes.n_blocks * unit
        return int(run.element_bytes * (3 * unit + 2 * ends))
    if run.engine == "megatron" or run.replicas == 1 and run.zero_stage == 0:
        return 0
    if run.kernels == "fgpt":
        live = min(LIVE_PARAMETERS, shapes.params) * run.element_bytes if run.zero_stage == 3 else 0
        has_buffers = run.pp == 1 and (run.replicas > 1 or run.zero_stage == 3)
        return live + (_reduce_buffers(run) if has_buffers else 0)
    bucket = min(BUCKET, shapes.params)
    if run.zero_stage == 3:
        return min(LIVE_PARAMETERS, shapes.params) * run.element_bytes + bucket * run.reduced_bytes
    gathered = bucket * run.element_bytes if run.zero_stage and run.n_shards > 1 else 0
    return bucket * run.reduced_bytes + gathered


def _reduce_buffers(run: PlannedRun) -> int:
    """DeepSpeed 0.19.8's buffers of ZeRO 1 to 3, of a bucket's full size however small the model:
    two in ZeRO 1 and 2 with overlap_comm; in ZeRO-1 of what gradients are summed in.

    A pipeline has one, after the backward passes.
    """
    if run.zero_stage == 0:
        return 0
    sums = 4 if run.gradient_bytes >= 4 else run.element_bytes
    size = sums if run.zero_stage == 1 else run.element_bytes
    is_double = run.overlaps_reduction and run.pp == 1 and run.zero_stage < 3
    return run.bucket_elements * size * (2 if is_double else 1)


def _nccl_gib(run: PlannedRun, cluster: Cluster, known: dict[str, Any]) -> float:
    """A communicator has buffers for each channel, and more channels with more links in a node."""
    links = min(cluster.device.link_gb_s, known["nccl_most_gb_s"])
    return float(known["nccl_gib_per_100_gb_s"] * links / 100 * _groups(run))


def _groups(run: PlannedRun) -> int:
    """Number of communicators that a rank is in: of all ranks, and of each degree."""
    degrees = (run.ranks, run.tp, run.pp, run.cp, run.dp)
    return sum(degree > 1 for degree in degrees)


@cache
def _allowances() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(ALLOWANCES.read_text(encoding="utf-8"))
    return value
