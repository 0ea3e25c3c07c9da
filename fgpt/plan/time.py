"""Time of a training step of a planned run on a cluster, from shapes and a few constants.

Kernels (`kernels`) and communication (`communication`) of one micro-batch on each pipeline stage
give the step of the slowest stage. Its constants are in efficiency.json, fitted by `fit` and judged
by `judge`. Times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.model.count import forward_flops_per_token
from fgpt.plan.cluster import Cluster
from fgpt.plan.communication import (
    Window,
    context_block,
    data_communication,
    stage_params,
    stage_send,
    tensor_sum,
)
from fgpt.plan.efficiency import Efficiency, efficiency_of
from fgpt.plan.kernels import Kernels, KernelTime, PassTimes
from fgpt.plan.planned_run import PlannedRun

PCIE_GB_S = 22.0
"""From a device to its host, each direction: PCIe 4.0 x16, as measured."""
HOST_MEMORY_GB_S = 150.0
"""Of a node's processors, as an Adam step on all of their cores reaches it."""
ADAM_BYTES = 30
"""Per parameter that a fused mixed-precision Adam reads and writes: gradient 4; master weight,
momentum, variance 8 each; weight 2."""
GRADIENT_PASS_BYTES = 12
"""Per parameter: gradient norm (4), unscaling or clipping (8)."""
ZERO_3_HOST_S = 0.012
"""Of a block's micro-batch: DeepSpeed's hooks around each module (124M parameters on one H100: 166
ms a step of 12 blocks, where ZeRO-2 takes 72)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by term, of the slowest pipeline stage; `total` is their sum."""

    matrix_products: float
    """Of the blocks, forward and backward."""
    attention: float
    memory_bound: float
    """Norms, activations, residual sums; without the head's."""
    head_and_loss: float
    """And the embedding, where the slowest stage has them."""
    recomputation: float
    """Of the blocks' kernels; its communication is in `tensor_communication`."""
    launch: float
    """Where the device waits between kernels, or for the host."""
    tensor_communication: float
    context_communication: float
    pipeline_sends: float
    pipeline_bubble: float
    data_communication: float
    """What does not overlap with kernels."""
    optimizer: float
    low_factor: float
    high_factor: float
    model_flops: float
    """Of a step on all ranks; attention counts all scores (Chowdhery et al. 2022, appendix B)."""
    hardware_flops: float
    """With recomputation."""
    peak_flop_s: float
    """Of all ranks."""

    def terms(self) -> dict[str, float]:
        """Name -> seconds of each part of `total`."""
        return {
            "matrix_products": self.matrix_products,
            "attention": self.attention,
            "memory_bound": self.memory_bound,
            "head_and_loss": self.head_and_loss,
            "recomputation": self.recomputation,
            "launch": self.launch,
            "tensor_communication": self.tensor_communication,
            "context_communication": self.context_communication,
            "pipeline_sends": self.pipeline_sends,
            "pipeline_bubble": self.pipeline_bubble,
            "data_communication": self.data_communication,
            "optimizer": self.optimizer,
        }

    @property
    def total(self) -> float:
        return sum(self.terms().values())

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high): 8 of 10 runs that were not fitted took between these times."""
        return self.total * self.low_factor, self.total * self.high_factor

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: a fraction of the peak."""
        return self.model_flops / (self.total * self.peak_flop_s)

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilization: MFU with recomputation counted."""
        return self.hardware_flops / (self.total * self.peak_flop_s)


def step_time(run: PlannedRun, cluster: Cluster, efficiency: Efficiency | None = None) -> StepTime:
    """Return the time of a step; `efficiency`: default, that of the cluster's device."""
    constants = efficiency or efficiency_of(cluster.device.name)
    parts = _Parts.of(run, cluster, constants)
    counts = stage_blocks(run.model, run.pp, run.partition)
    stages = [parts.stage(s, counts) for s in sorted({0, _heaviest(counts), run.pp - 1})]
    slowest = max(stages, key=lambda stage: stage.seconds)
    others = _all_stages(stages, counts) - slowest.seconds  # of one micro-batch
    m, params = run.accumulation, stage_params(run, max(counts))
    flops = forward_flops_per_token(run.model, run.seq_len)
    head_flops = 2 * run.model.vocab_size * run.model.d_model
    recomputed = _recomputed_flops(run, flops - head_flops)
    return StepTime(
        matrix_products=m * slowest.blocks.matrix,
        attention=m * slowest.blocks.attention,
        memory_bound=m * slowest.blocks.memory,
        head_and_loss=m * slowest.ends,
        recomputation=m * slowest.recomputed,
        launch=m * slowest.launch,
        tensor_communication=m * slowest.tensor,
        context_communication=m * slowest.context,
        pipeline_sends=m * slowest.sends,
        pipeline_bubble=others / run.interleave,
        data_communication=data_communication(run, cluster, constants, params, slowest.window),
        optimizer=_optimizer(run, cluster, constants, params),
        low_factor=constants.low,
        high_factor=constants.high,
        model_flops=3.0 * flops * run.tokens_per_step,
        hardware_flops=(3.0 * flops + recomputed) * run.tokens_per_step,
        peak_flop_s=run.ranks * cluster.device.peak_tflops(run.precision) * 1e12,
    )


@lru_cache(maxsize=4096)
def stage_blocks(model: ModelConfig, pp: int, partition: str) -> tuple[int, ...]:
    """Blocks of each pipeline stage."""
    run = PlannedRun(model, 1, 1, 1, "bf16", pp=pp, partition=partition)
    return tuple(sum(name.startswith("blocks.") for name in stage) for stage in run.stages())


def _heaviest(counts: tuple[int, ...]) -> int:
    """The first stage with most blocks that is neither the first nor the last, if there is one."""
    middle = range(1, len(counts) - 1) if len(counts) > 2 else range(len(counts))
    return max(middle, key=lambda stage: counts[stage])


@dataclass(frozen=True)
class _Stage:
    """Seconds of one micro-batch on one pipeline stage."""

    n_blocks: int
    blocks: KernelTime
    """Forward and backward, without recomputation."""
    ends: float
    recomputed: float
    launch: float
    tensor: float
    context: float
    sends: float
    forward_share: float
    """Of kernels without recomputation, those of the forward pass."""

    @property
    def kernels(self) -> float:
        return self.blocks.seconds + self.ends + self.recomputed

    @property
    def seconds(self) -> float:
        return self.kernels + self.launch + self.tensor + self.context + self.sends

    @property
    def window(self) -> Window:
        forward = (self.kernels - self.recomputed) * self.forward_share
        return Window(forward, self.kernels - forward, self.n_blocks)


@dataclass(frozen=True)
class _Parts:
    """Times that all stages share."""

    run: PlannedRun
    constants: Efficiency
    block: PassTimes
    recomputed: KernelTime
    """Of one block."""
    embedding: PassTimes
    head: PassTimes
    tensor_block: float
    """Communication of one block, recomputation included."""
    tensor_end: float
    """Of the embedding, and of the head."""
    context_block: float
    send: float
    """To one neighbour and back."""

    @classmethod
    def of(cls, run: PlannedRun, cluster: Cluster, constants: Efficiency) -> _Parts:
        kernels = Kernels(run, cluster.device, constants)
        block = kernels.block()
        tensor = tensor_sum(run, cluster, constants)
        sums = 4 + 2 * (run.recompute == "full") * run.recomputed_share
        return cls(
            run,
            constants,
            block,
            _recomputed(run, kernels, block),
            kernels.embedding(),
            kernels.head(),
            sums * tensor,
            tensor,
            context_block(run, cluster, constants, block),
            stage_send(run, cluster, constants),
        )

    def stage(self, stage: int, counts: tuple[int, ...]) -> _Stage:
        """Stage `stage` of a pipeline whose stages have so many blocks."""
        n, run = counts[stage], self.run
        is_first, is_last = stage == 0, stage == len(counts) - 1
        blocks = (self.block.forward + self.block.backward).times(n)
        recomputed = self.recomputed.times(n)
        ends = KernelTime()
        if is_first:
            ends += self.embedding.forward + self.embedding.backward
        if is_last:
            ends += self.head.forward + self.head.backward
        neighbours = (not is_first) + (not is_last)
        tensor = n * self.tensor_block + (is_first + is_last) * self.tensor_end
        context = n * self.context_block
        return _Stage(
            n_blocks=n,
            blocks=blocks,
            ends=ends.seconds,
            recomputed=recomputed.seconds,
            launch=self._launch(n, blocks + ends + recomputed, tensor + context),
            tensor=tensor,
            context=context,
            # both ends of a part wait for the same send
            sends=neighbours * self.send * run.interleave / 2 if run.pp > 1 else 0.0,
            forward_share=self.block.forward.seconds / self.block.seconds,
        )

    def _launch(self, n_blocks: int, kernels: KernelTime, communication: float) -> float:
        """Seconds in which the device has nothing to do, though it could compute."""
        gaps = kernels.count * self.constants.kernel_us * 1e-6
        is_megatron = self.run.engine == "megatron" or self.run.model.attention == "reference"
        start = self.constants.host_megatron_us if is_megatron else self.constants.host_us
        host = kernels.count * start * 1e-6
        if self.run.engine == "deepspeed" and self.run.zero_stage == 3:
            host += n_blocks * ZERO_3_HOST_S
        return max(gaps, host - kernels.seconds - communication)


def _all_stages(stages: list[_Stage], counts: tuple[int, ...]) -> float:
    """Seconds of one micro-batch on all stages, one after another.

    `stages`: the first, the heaviest and the last one; those between differ in blocks alone.
    """
    if len(stages) < 3:
        return sum(stage.seconds for stage in stages[: len(counts)])
    first, middle, last = stages
    between = sum(counts[1:-1]) * middle.seconds / middle.n_blocks
    return first.seconds + between + last.seconds


def _recomputed(run: PlannedRun, kernels: Kernels, block: PassTimes) -> KernelTime:
    if run.recompute == "full":
        return block.forward.times(run.recomputed_share)
    if run.recompute == "attention":
        return kernels.attention_core() if kernels.is_unfused_attention else KernelTime()
    if run.recompute == "cheap":
        forward = block.forward
        kept = 0.0 if kernels.is_unfused_attention else forward.attention
        attention = forward.attention - kept
        return KernelTime(0.0, attention, forward.memory, forward.count - 4)
    return KernelTime()


def _recomputed_flops(run: PlannedRun, blocks: int) -> float:
    """Per token; `blocks`: of a forward pass without the head."""
    if run.recompute == "full":
        return run.recomputed_share * blocks
    if run.recompute == "attention" and run.model.attention == "reference":
        shapes = Shapes.of(run.model)
        return 4.0 * run.model.n_layer * shapes.n_head * shapes.d_head * run.seq_len
    return 0.0


def _optimizer(run: PlannedRun, cluster: Cluster, constants: Efficiency, params: float) -> float:
    """Seconds of the gradient norm and of Adam on this rank's shard."""
    shards = run.n_shards if run.zero_stage else 1
    own = params / shards
    bandwidth = cluster.device.memory_gb_s * 1e9 * constants.memory
    norm = GRADIENT_PASS_BYTES * own / bandwidth
    if run.offloads_optimizer:
        # gradients to the host, weights back; the devices of a node share its memory
        transfer = (run.gradient_bytes + run.element_bytes) * own / (PCIE_GB_S * 1e9)
        host = HOST_MEMORY_GB_S * 1e9 / cluster.gpus_per_node
        return norm + transfer + ADAM_BYTES * own / host
    step = norm + ADAM_BYTES * own / bandwidth
    return step
