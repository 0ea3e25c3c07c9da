"""What the training loop knows of an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fgpt.data.loader import MicroBatch
from fgpt.engine.async_scalars import AsyncScalars
from fgpt.model.context import BatchContext
from fgpt.model.mask import AttentionMask


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    """Mean loss over the global batch, in nats per token."""
    grad_norm: float
    """L2 norm of the global gradient before clipping; nan or inf when the step was skipped."""
    learning_rate: float
    """The rate this step used."""
    skipped: bool
    """The gradients were not finite, the weights are unchanged."""
    loss_scale: float | None = None
    """fp16's loss scale, else None."""


@dataclass(frozen=True)
class PendingStep:
    """One optimizer step that the device may still be busy with, the same on every rank."""

    numbers: AsyncScalars
    """Loss, gradient norm, and 1 or 0: skipped or not."""
    learning_rate: float
    """See `StepResult`."""
    loss_scale: float | None = None
    """See `StepResult`."""

    def result(self) -> StepResult:
        """What the step was like; waits until it has been taken."""
        loss, norm, skipped = self.numbers.read()
        return StepResult(loss, norm, self.learning_rate, bool(skipped), self.loss_scale)


@dataclass(frozen=True)
class SavedFile:
    """One file of a checkpoint, as this rank wrote it."""

    name: str
    """Its name inside the checkpoint's directory."""
    size_bytes: int
    """Bytes written."""
    sha256: str
    """Hash of the bytes as they were written."""


def batch_context(
    batch: MicroBatch, device: torch.device, seed: int, step: int, first_sample: int
) -> BatchContext:
    """Return the forward-pass context of a micro-batch, its tensors on `device`."""
    positions = batch.positions
    return BatchContext(
        seed,
        step,
        first_sample,
        AttentionMask(batch.begins),
        None if positions is None else positions.to(device, non_blocking=True),
    )


class Engine(Protocol):
    """A model that trains. Every method is called by all ranks together."""

    model: nn.Module
    """The module; calling it runs a forward pass on this rank, sharded weights included."""

    @property
    def step(self) -> int:
        """Optimizer steps taken since the start of the run, skipped ones included."""
        ...

    @property
    def skipped_steps(self) -> int:
        """How many of them were skipped."""
        ...

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> PendingStep:
        """One optimizer step on this rank's micro-batches of one global batch."""
        ...

    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Mean loss [] of this rank's micro-batches of one global batch, without gradients.

        A pipeline answers with the mean over all data ranks, for its ranks have no loss of their
        own; a context-parallel rank with that of its tokens. The mean over all ranks is the loss.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, whole tensor) of every parameter, as the model computes with it.

        All ranks go through it to its end; each gets all, one at a time.
        """
        ...

    def first_moments(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, whole tensor) of Adam's first moments, float32; otherwise as `weights`."""
        ...

    def save(self, directory: Path) -> list[SavedFile]:
        """Write this rank's part into an existing directory; raises OSError if that failed here.

        A failure on one rank leaves the others free: nobody waits for it inside.
        """
        ...

    def load(self, directory: Path) -> None:
        """Read what `save` wrote at the same layout. Raises CheckpointError."""
        ...

    def log_scalars(self, scalars: dict[str, float], samples: int) -> None:
        """Hand numbers to the monitors of the DeepSpeed JSON, as of so many training samples."""
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...
