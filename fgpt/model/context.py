"""Per-forward-pass context shared by all layers; set by the engine.

Each layer takes one tensor and returns one, also as part of a pipeline stage and when activations
are recomputed. Everything else that layers need to know about a forward pass is read from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fgpt.model.mask import CAUSAL, AttentionMask


class BatchContext(NamedTuple):
    """Context of one micro-batch: B samples of T tokens, full rows on every rank."""

    seed: int = 0
    """Seed of the dropout masks."""
    step: int = 0
    """Optimizer step, which the dropout masks depend on."""
    first_sample: int = 0
    """Index of the micro-batch's first sample in the global batch."""
    mask: AttentionMask = CAUSAL
    """Which tokens attend to which."""
    positions: Tensor | None = None
    """Position of each token, int64 [B, T], on the model's device; None: its column."""


class ForwardContext:
    """Holds the context of the forward pass that is running; one per model."""

    def __init__(self) -> None:
        self.current = BatchContext()

    @contextlib.contextmanager
    def activate(self, context: BatchContext) -> Iterator[None]:
        """Make `context` current. Recomputation, which runs after the engine has moved on to other
        micro-batches, activates the context of its own forward pass.
        """
        before, self.current = self.current, context
        try:
            yield
        finally:
            self.current = before
