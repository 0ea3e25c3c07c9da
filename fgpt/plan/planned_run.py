"""What the planner is asked about: a model, a batch, and how an engine divides them among ranks.

FGPT's own runs, runs that others published, and the candidates of a search are all `PlannedRun`s,
so that one formula serves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fgpt.config.schema import ModelConfig
from fgpt.parallel.pipeline.partition import layer_names, stage_bounds

Engine = Literal["deepspeed", "megatron", "fsdp"]
"""megatron: also its distributed optimizer (`zero_stage` 1); fsdp: torch's (`zero_stage` 3)."""
PlannedPrecision = Literal["fp32", "fp16", "bf16", "fp8"]
"""fp8: of matrix products; weights are bf16."""
Recompute = Literal["none", "full", "cheap", "attention"]
"""full: blocks; cheap: all but projections and fused attention (`speed.recompute`); attention:
scores, softmax and their product with the values (Korthikanti et al. 2022)."""


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
    offloads_optimizer: bool = False
    offloads_params: bool = False
    is_compiled: bool = False
    """Elementwise operations of a block run as fused kernels."""

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
