"""What every reader of weights needs of them, wherever they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fgpt.checkpoint.boxes import Box
from fgpt.config.schema import ModelConfig


@dataclass(frozen=True)
class SourceFacts:
    """What is known of how the weights came about; None: unknown."""

    step: int | None = None
    """Optimizer steps."""
    tokens: int | None = None
    """Tokens trained on."""
    valid_loss: float | None = None
    """Validation loss of these weights, nats per token."""
    run_config: dict[str, Any] | None = None
    """The resolved configuration of the run that trained them."""


class WeightSource(Protocol):
    """The weights of one model by their logical names; files are read when they are needed."""

    path: Path
    """The checkpoint, or the directory of Hugging Face."""
    config: ModelConfig
    """The model."""
    facts: SourceFacts
    """How the weights came about."""
    shapes: Mapping[str, tuple[int, ...]]
    """Logical name -> shape."""

    def names(self) -> Sequence[str]:
        """The logical names of all weights."""

    def read(self, name: str) -> Tensor:
        """Return a whole logical tensor in its stored dtype. Raises CheckpointError."""

    def copy(self, name: str, box: Box, target: Tensor) -> None:
        """Copy a box of a logical tensor into `target`, of its sizes, reading nothing else.

        Raises CheckpointError.
        """
