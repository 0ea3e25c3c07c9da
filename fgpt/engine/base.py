"""The engine protocol: what the training loop, checkpoints and parity know of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.data.loader import MicroBatch
from fgpt.engine.state import Progress, StateTensor
from fgpt.model.context import BatchContext
from fgpt.model.mask import AttentionMask
from fgpt.parallel.topology import ProcessGroups

if TYPE_CHECKING:
    from fgpt.engine.moving_average import MovingAverage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""torch's dtype of each precision."""


class AsyncScalars:
    """Scalars copied from the device to pinned host memory without stalling the device.

    `float(tensor)` blocks Python until the GPU has finished all queued work, and the GPU then idles
    until Python queues more. These scalars are usually read one step later, when they have arrived.
    """

    def __init__(self, *scalars: Tensor | float):
        """Each is a Python number or a tensor []; all tensors are on one device."""
        tensors = [s for s in scalars if isinstance(s, Tensor)]
        self._scalars = list(scalars)
        self._copied: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            stacked = torch.stack([t.detach().float() for t in tensors])
            host = torch.empty(stacked.shape, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            copies = iter(host)
            self._scalars = [next(copies) if isinstance(s, Tensor) else s for s in scalars]
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def on_host(self) -> bool:
        """True if no scalar was on a GPU.

        Equal on all ranks, so that they read in the same step; "the copy has finished" is not.
        """
        return self._copied is None

    @property
    def is_ready(self) -> bool:
        """Whether `read` returns at once."""
        return self._copied is None or self._copied.query()

    def read(self) -> list[float]:
        """Return the values; waits for their copy, not for work queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(s) for s in self._scalars]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; equal on every rank."""

    loss: float
    """Mean loss over the global batch, in nats per token."""
    grad_norm: float
    """L2 norm of the global gradient before clipping; nan or inf if the step was skipped."""
    learning_rate: float
    """The rate this step used."""
    skipped: bool
    """True if the gradients were not finite; the weights are unchanged."""
    loss_scale: float | None = None
    """fp16's loss scale, else None."""


@dataclass(frozen=True)
class PendingStep:
    """One optimizer step that the device may still be computing; equal on every rank."""

    scalars: AsyncScalars
    """Loss, gradient norm, and 1 if the step was skipped, else 0."""
    learning_rate: float
    """See `StepResult`."""
    loss_scale: float | None = None
    """See `StepResult`."""

    def result(self) -> StepResult:
        """Return the finished step; waits for the device."""
        loss, norm, skipped = self.scalars.read()
        return StepResult(loss, norm, self.learning_rate, bool(skipped), self.loss_scale)


def batch_context(
    batch: MicroBatch, device: torch.device, seed: int, step: int, first_sample: int
) -> BatchContext:
    """Return the forward-pass context of a micro-batch, its tensors on `device`."""
    positions = batch.positions
    return BatchContext(
        seed,
        step,
        first_sample,
        AttentionMask(batch.document_begins),
        None if positions is None else positions.to(device, non_blocking=True),
    )


class Engine(Protocol):
    """A model in training. All ranks call every method together."""

    model: nn.Module
    """Calling it runs a forward pass on this rank, sharded weights included."""
    average: MovingAverage | None
    """The moving average of the weights; None: the configuration has none."""
    on_gradients: Callable[[], None] | None
    """Called before each optimizer step, when `gradients` is valid; None by default."""

    @property
    def groups(self) -> ProcessGroups | None:
        """The grid's process groups; None: this process has the whole model."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps since the start of the run, skipped ones included."""
        ...

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps."""
        ...

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> PendingStep:
        """Take one optimizer step on this rank's micro-batches of one global batch."""
        ...

    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return the mean loss [] of this rank's micro-batches of one global batch, no gradients.

        The mean over all ranks is the loss of the global batch: a context-parallel rank returns the
        mean over its own tokens, a pipeline rank the mean over all data ranks.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are their moving average, for evaluations. Collective at both ends.

        Only with an `average`. An exception inside ends the run: the master weights are restored,
        for a last checkpoint; those of the forward pass are not.
        """
        ...

    def decoding_layers(self) -> AbstractContextManager[Mapping[str, nn.Module]]:
        """This rank's layers of `GPT.layers()`, by name, for decoding inside.

        In evaluation mode, where they are, without sequence parallelism: a `ParallelDecoder` runs
        them, on all ranks together.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (logical name, full tensor) of every parameter, in the precision of the model.

        Collective: all ranks exhaust the iterator, and each gets every tensor, one at a time.
        """
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (logical name, full gradient), float32; otherwise like `weights`.

        Averaged over the global batch, not clipped. Valid only inside `on_gradients`.
        """
        ...

    def saving(self) -> AbstractContextManager[Sequence[StateTensor]]:
        """This rank's training state, to read inside; it is that of the latest step."""
        ...

    def progress(self) -> Progress:
        """The scalars of the training state; waits for the latest step."""
        ...

    def restoring(
        self, progress: Progress, states: Sequence[str]
    ) -> AbstractContextManager[Sequence[StateTensor]]:
        """The master weights and these optimizer states of this rank, to fill inside.

        Then the weights of the model follow, and the engine is where `progress` says. States that
        are not named stay new. Leaving the context is collective.
        """
        ...

    @property
    def state_names(self) -> Sequence[str]:
        """The optimizer states that a parameter has after a step."""
        ...

    def open_monitors(
        self, settings: DeepSpeedSettings, run_dir: Path, warn: Callable[[str], None]
    ) -> None:
        """Open the monitors of the DeepSpeed JSON on rank 0, after `load`. Raises LaunchError.

        `warn` prints what cannot be written later.
        """
        ...

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Send scalars of a step to the monitors."""
        ...

    def close(self) -> None:
        """Release process groups and buffers."""
        ...
