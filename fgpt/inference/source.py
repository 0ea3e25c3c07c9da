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
    origin: str = ""
    """What `describe` gave for the weights that the run began with; "": none, or unknown."""
    base_model: str = ""
    """Name on the Hugging Face Hub of these weights or of what they began as; "": unknown."""

    is_average: bool = False
    """Whether they are the moving average of the weights that were trained."""

    @property
    def is_trained(self) -> bool:
        """Whether FGPT has trained them."""
        return bool(self.tokens)


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

    def fingerprint(self) -> str:
        """SHA-256 that identifies the weights, without reading all of them. Raises OSError."""

    def names(self) -> Sequence[str]:
        """The logical names of all weights."""

    def read(self, name: str) -> Tensor:
        """Return a whole logical tensor in its stored dtype. Raises CheckpointError."""

    def copy(self, name: str, box: Box, target: Tensor) -> None:
        """Copy a box of a logical tensor into `target`, of its sizes, reading nothing else.

        Raises CheckpointError.
        """


BEFORE = ", before that "
"""Joins the description of weights with that of the weights that they began as."""


def describe(source: WeightSource) -> str:
    """Return where weights are, how much they were trained, which ones they are, and the same of
    what they began as: the lineage of what is made of them. Raises OSError.
    """
    facts = source.facts
    known = [] if facts.tokens is None else [f"step {facts.step}", f"{facts.tokens:,} tokens"]
    known.append(f"sha256 {source.fingerprint()[:12]}")
    before = BEFORE + facts.origin if facts.origin else ""
    return f"{source.path.absolute()} ({', '.join(known)}){before}"


def without_folders(origin: str) -> str:
    """Return a description for publishing: of each path the last name only."""
    return BEFORE.join(part.rpartition("/")[2] for part in origin.split(BEFORE))
