"""DeepSpeed's pipeline engine behind FGPT's protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from torch import Tensor, nn

from fgpt.data.loader import MicroBatch
from fgpt.engine.base import PendingStep
from fgpt.engine.deepspeed.optimizer_step import overflow_explained
from fgpt.engine.deepspeed.zero_engine import EngineDependencies, ZeroEngine
from fgpt.parallel.pipeline.stage import PipelineStage, logical_parameters


class PipeEngine(ZeroEngine):
    """One stage of a pipeline; `model` is this rank's `PipelineStage` and has no forward pass.

    Every rank is given its data rank's micro-batches; the first stage reads the ids, the last one
    the targets.
    """

    deepspeed: PipelineEngine
    model: PipelineStage

    def __init__(self, deepspeed: PipelineEngine, setup: EngineDependencies):
        super().__init__(deepspeed, setup)
        self._shape: torch.Size | None = None

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> PendingStep:
        """See `Engine.train_batch`."""
        with overflow_explained(self.deepspeed):
            loss = self.deepspeed.train_batch(self._mine(micro_batches))
        self._tie()
        if self.deepspeed.steps_per_print() is None:
            self.deepspeed.timers(TRAIN_BATCH_TIMER).reset()  # it keeps every step's time
        return self.optimizer_step.pending(loss)

    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """See `Engine.eval_batches`."""
        loss = self.deepspeed.eval_batch(
            self._mine(micro_batches), num_micro_batches=len(micro_batches)
        )
        return loss.reshape(())

    def load(self, directory: Path) -> None:
        """See `Engine.load`."""
        super().load(directory)
        self._tie()

    def close(self) -> None:
        """See `Engine.close`."""
        super().close()
        # the last stage keeps outputs, whose hooks hold the engine where no collector sees it
        self.deepspeed.pipe_buffers.clear()
        self.deepspeed.loss = self.deepspeed.fwd_outputs = None

    def _tie(self) -> None:
        """Where replicas divide work, each stage sums up and updates a tied weight in an order of
        its own, and rounding would drive the copies apart.
        """
        if self.groups.grid.replicas > 1:
            self.model.sync_tied_weights()

    def parameters(self) -> dict[str, nn.Parameter]:
        """This stage's parameters by logical name."""
        return logical_parameters(self.model)

    def _mine(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, Tensor]]:
        """The ids and targets; the stage is told what else there is to know, before each pass."""
        self.model.batch_contexts = (
            self._batch_context(n, batch) for n, batch in enumerate(micro_batches)
        )
        shape = micro_batches[0].inputs.shape
        if shape != self._shape:
            self.deepspeed.reset_activation_shape()  # stages tell each other the shape once
            self._shape = shape
        return ((self._own(batch.inputs), self._own(batch.targets)) for batch in micro_batches)
