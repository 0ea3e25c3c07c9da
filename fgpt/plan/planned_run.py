"""What the planner is asked about: a model, a batch, and how an engine divides them among ranks.

FGPT's own runs, runs that others published, and the candidates of a search are all `PlannedRun`s,
so that one formula serves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fgpt.config.schema import ModelConfig
from fgpt.config.speed import compiles_blocks
from fgpt.parallel.pipeline.partition import layer_names, stage_bounds

if TYPE_CHECKING:
    from fgpt.config.resolve import Resolved

Engine = Literal["deepspeed", "megatron", "fsdp"]
"""megatron: with `zero_stage` 1, its distributed optimizer; fsdp: torch's (`zero_stage` 3)."""
PlannedPrecision = Literal["fp32", "fp16", "bf16", "fp8"]
"""fp8: of matrix products; weights are bf16."""
Recompute = Literal["none", "full", "cheap", "attention"]
"""full: blocks; cheap: all but projections and fused attention (`speed.recompute`); attention:
scores, softmax and their product with the values (Korthikanti et al. 2022)."""
RECOMPUTES: dict[str, Recompute] = {"all": "full", "cheap": "cheap"}
"""`speed.recompute` -> what is recomputed, with activation_checkpointing in the JSON."""
Kernels = Literal["fgpt", "megatron"]
"""Whose blocks and loss: they differ in the tensors that a forward pass keeps."""
Loss = Literal["plain", "fused", "in_place"]
"""fused: head and cross entropy are one operation that never holds all logits (`speed.loss`);
in_place: cross entropy writes the gradient over the 16-bit logits (flash-attention's)."""


@dataclass(frozen=True)
class PlannedRun:
    """One training step of one layout. Degrees are numbers of ranks."""

    model: ModelConfig
    seq_len: int
    """Tokens of a sample."""
    micro: int
    """Samples of a micro-batch of one data-parallel rank."""
    accumulation: int
    """Micro-batches of a step."""
    precision: PlannedPrecision
    engine: Engine = "deepspeed"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    zero_stage: int = 0
    shards: int | None = None
    """Ranks that share the sharded states; default dp x cp."""
    interleave: int = 1
    """Parts of the model on each pipeline stage (Megatron's virtual pipeline)."""
    sequence: bool = False
    """Sequence parallelism within the tensor-parallel group."""
    recompute: Recompute = "none"
    recomputed_share: float = 1.0
    """Of the blocks, those that are recomputed."""
    gradient_bytes: int = 4
    """Of one element where gradients are summed over micro-batches."""
    reduced_bytes: int = 4
    """Of one element of a gradient that is sent to other ranks."""
    state_bytes: float = 8.0
    """Of the optimizer's states of one parameter."""
    partition: str = "parameters"
    """`parallel.partition`: how the pipeline divides the blocks."""
    bucket_elements: int = 500_000_000
    """Of DeepSpeed's reduce bucket; its own default."""
    overlaps_reduction: bool = False
    """`overlap_comm`: gradients are reduced during the backward pass."""
    offloads_optimizer: bool = False
    offloads_params: bool = False
    is_compiled: bool = False
    """Elementwise operations of a block run as fused kernels."""
    kernels: Kernels = "fgpt"
    fused_optimizer: bool = True
    """One kernel updates a parameter; torch.optim's others write temporary tensors."""
    loss: Loss = "plain"

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def replicas(self) -> int:
        """Ranks that have the same weights before ZeRO shards them."""
        return self.dp * self.cp

    @property
    def n_shards(self) -> int:
        return self.shards or self.replicas

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.micro * self.accumulation * self.dp

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch on one rank."""
        return self.micro * self.seq_len // self.cp

    @property
    def is_transformer_engine(self) -> bool:
        """Megatron since 2023, with the kernels of Transformer Engine."""
        return self.engine == "megatron" and self.model.attention == "sdpa"

    @property
    def element_bytes(self) -> int:
        """Of an activation."""
        return 4 if self.precision == "fp32" else 2

    def stages(self) -> list[list[str]]:
        """Names of the layers of each pipeline stage."""
        names = layer_names(self.model)
        if self.pp == 1:
            return [names]
        bounds = stage_bounds(self.model, self.pp, self.partition)
        return [names[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def planned_run(resolved: Resolved) -> PlannedRun:
    """Return the run of a complete configuration."""
    run, batch, settings = resolved.run, resolved.batch, resolved.engine_settings
    optimizer = resolved.settings.optimizer
    assert optimizer is not None  # resolved
    n_states = len(optimizer.state_names(resolved.settings.optimizer_params))
    is_recomputed = resolved.settings.checkpointing is not None
    overlaps = settings.get("zero_optimization.overlap_comm")
    is_fp8 = run.speed.matmul == "fp8"
    sums = 4 if settings.accumulates_fp32 else 2
    return PlannedRun(
        model=run.model,
        seq_len=resolved.seq_len,
        micro=batch.micro,
        accumulation=batch.accumulation,
        precision="fp8" if is_fp8 else resolved.precision,
        tp=batch.tp,
        pp=batch.pp,
        cp=batch.cp,
        dp=batch.dp,
        zero_stage=resolved.zero_stage,
        sequence=run.parallel.sequence,
        recompute="none" if not is_recomputed else RECOMPUTES[run.speed.recompute],
        gradient_bytes=6 if settings.has_separate_grad_sums else sums,
        reduced_bytes=sums,
        state_bytes=float(n_states * optimizer.state_bytes),
        partition=run.parallel.partition,
        bucket_elements=int(settings.get("zero_optimization.reduce_bucket_size")),
        # DeepSpeed's default depends on the stage
        overlaps_reduction=resolved.zero_stage == 3 if overlaps is None else overlaps,
        offloads_optimizer=settings.offloads_optimizer,
        offloads_params=settings.offloads_params,
        is_compiled=compiles_blocks(run, resolved.zero_stage, resolved.device),
    )
