"""DeepSpeed's pipeline engine behind the engine protocol."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from fgpt.data.loader import MicroBatch
from fgpt.engine.base import PendingStep
from fgpt.engine.deepspeed import patches
from fgpt.engine.deepspeed.optimizer_step import loss_scale_errors
from fgpt.engine.deepspeed.zero_engine import EngineDependencies, ZeroEngine
from fgpt.engine.state import Progress, StateTensor
from fgpt.parallel.pipeline.stage import TIED_PARAMETER, PipelineStage, logical_parameters


class PipeEngine(ZeroEngine):
    """An `Engine` for one pipeline stage; its `model`, a `PipelineStage`, cannot be called alone.

    Every rank gets the micro-batches of its data rank; the first stage reads the ids, the last one
    the targets.
    """

    deepspeed: PipelineEngine
    model: PipelineStage

    def __init__(self, deepspeed: PipelineEngine, dependencies: EngineDependencies):
        super().__init__(deepspeed, dependencies)
        self._activation_shape: torch.Size | None = None

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> PendingStep:
        self._fit_accumulation(len(micro_batches))
        # 1. forward and backward of all micro-batches, and the optimizer step
        with loss_scale_errors(self.deepspeed):
            loss = self.deepspeed.train_batch(self._stage_inputs(micro_batches))
        # 2. make both copies of a tied weight equal again
        self._sync_tied_weights()
        # 3. drop the timer's record, unless steps_per_print shows it
        if self.deepspeed.steps_per_print() is None:
            patches.drop_step_times(self.deepspeed)
        return self.optimizer_step.pending(loss)

    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        inputs = self._stage_inputs(micro_batches)
        loss = self.deepspeed.eval_batch(inputs, num_micro_batches=len(micro_batches))
        return loss.reshape(())

    @contextmanager
    def restoring(self, progress: Progress, states: Sequence[str]) -> Iterator[list[StateTensor]]:
        with super().restoring(progress, states) as tensors:
            yield tensors
        self._sync_tied_weights()

    def _update_weights(self) -> None:
        super()._update_weights()
        self._sync_tied_weights()

    def close(self) -> None:
        super().close()
        patches.release_pipeline_outputs(self.deepspeed)

    def _sync_tied_weights(self) -> None:
        """Copy the first stage's tied weight to the last stage.

        With several replicas each stage reduces and updates its copy in another order, and rounding
        errors would make them diverge.
        """
        if self.groups.grid.replicas > 1:
            self.model.sync_tied_weights()

    def _layers(self) -> Mapping[str, nn.Module]:
        return self.model.layers

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return this stage's parameters by logical name."""
        return logical_parameters(self.model)

    def _saved_elsewhere(self) -> Collection[str]:
        """A tied weight, which the first stage saves."""
        is_first = self.groups.coordinates.pipe == 0
        return () if is_first or not self.model.tied else (TIED_PARAMETER,)

    def _stage_inputs(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Return (ids, targets) of each micro-batch, and queue their contexts in the stage."""
        self.model.batch_contexts = (
            self._batch_context(n, batch) for n, batch in enumerate(micro_batches)
        )
        shape = micro_batches[0].inputs.shape
        if shape != self._activation_shape:
            self.deepspeed.reset_activation_shape()  # stages exchange the shape only once
            self._activation_shape = shape
        return (
            (self._local_tokens(batch.inputs), self._local_tokens(batch.targets))
            for batch in micro_batches
        )
