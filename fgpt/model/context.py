"""What a forward pass is about, beside its ids: the engine tells the model, its layers read it.

The layers of a GPT are called one after the other with one tensor each, also as the stages of a
pipeline and when activations are recomputed; what they share they find here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fgpt.model.mask import Documents


class BatchContext(NamedTuple):
    """One micro-batch: B samples of T tokens, whole on every rank."""

    seed: int = 0
    """Of dropout; so are the next two."""
    step: int = 0
    first_sample: int = 0
    """Position in the global batch of the micro-batch's first sample."""
    documents: Documents | None = None
    """Who may attend to whom; None: every token to all tokens before it."""
    positions: Tensor | None = None
    """Each token's position, int64 [B, T], on the model's device; None: its place in the row."""


class ForwardContext:
    """Per-forward-pass context shared by all layers; the engine sets it."""

    def __init__(self) -> None:
        self.current = BatchContext()

    @contextlib.contextmanager
    def activate(self, values: BatchContext) -> Iterator[None]:
        """Make this the current context; recomputation, which runs later, restores it."""
        before, self.current = self.current, values
        try:
            yield
        finally:
            self.current = before
