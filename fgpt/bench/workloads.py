"""What a scenario is made of: a model with its batch, and one way to train it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Subject = Literal["fgpt", "transformers", "transformers, bf16 weights", "transformers, compiled"]


class Workload(NamedTuple):
    """A model and its batch."""

    name: str
    """Model preset."""
    micro_batch: int
    """Samples of a micro-batch."""
    seq_len: int
    """Tokens of a sample."""


WORKLOADS: Mapping[str, Workload] = {
    row.name: row
    for row in (
        *(Workload(f"seed-{size}m", 32, 128) for size in (1, 9, 71, 143, 286)),
        Workload("mini", 8, 256),
        Workload("gpt2", 32, 1024),
        Workload("gpt2-medium", 16, 1024),
        Workload("gpt2-large", 12, 1024),
        Workload("gpt2-xl", 8, 1024),
    )
}


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to train a model."""

    name: str
    """The env_name of the tables."""
    adds: str
    """What is new in it, in a few words."""
    json: str
    """Which of ds_configs/bench/, without its ending."""
    precision: Literal["fp32", "bf16", "fastest"]
    """fastest: bf16 where the device multiplies it, else fp32."""
    sets: Mapping[str, Any] = field(default_factory=dict)
    """Run-file values; all others are the trainer's defaults."""
    device: Literal["cpu", "cuda"] | None = None
    """The only device on which it is something; None: any."""
    slow_mkl: bool = False
    """Only where oneDNN multiplies faster than torch's own choice."""
    subject: Subject = "fgpt"
    """Whose model and loop."""
    ranks: int = 1
    """Processes, one to a GPU; on a CPU they share its cores."""
    accumulation: int = 1
    """Micro-batches of one step."""
    micro_batch: int | None = None
    """Instead of the row's."""
