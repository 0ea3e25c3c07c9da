"""DeepSpeed's pipeline engine behind FGPT's protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from torch import Tensor, nn

from fgpt.engine.base import MicroBatch, StepResult
from fgpt.engine.launch import World
from fgpt.engine.zero import ZeroEngine, overflow_explained
from fgpt.parallel.pipeline import Stage, logical_parameters
from fgpt.parallel.topology import Groups


class PipeEngine(ZeroEngine):
    """One stage of a pipeline; `model` is this rank's `Stage` and has no forward pass of its own.

    Every rank is given its data rank's micro-batches; the first stage reads the ids, the last one
    the targets.
    """

    deepspeed: PipelineEngine
    model: Stage

    def __init__(
        self,
        deepspeed: PipelineEngine,
        world: World,
        groups: Groups,
        shapes: Mapping[str, torch.Size],
        seed: int,
        clip: float | None,
    ):
        """See `ZeroEngine`."""
        super().__init__(deepspeed, world, groups, shapes, seed, clip)
        self._norm: float | None = None
        self._take_step = deepspeed._take_model_step
        if clip is not None:
            deepspeed._take_model_step = self._clip_and_step

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """See `Engine.train_batch`."""
        rate = float(self.deepspeed.get_lr()[0])
        self.model.moments = (self._now(n, len(ids)) for n, (ids, _) in enumerate(micro_batches))
        with overflow_explained(self.deepspeed):
            loss = self.deepspeed.train_batch(self._mine(micro_batches))
        if self.deepspeed.steps_per_print() is None:
            self.deepspeed.timers(TRAIN_BATCH_TIMER).reset()  # it keeps every step's time
        return self._result(loss, rate, self._norm)

    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """See `Engine.eval_batches`."""
        loss = self.deepspeed.eval_batch(
            self._mine(micro_batches), num_micro_batches=len(micro_batches)
        )
        return loss.reshape(())

    def parameters(self) -> dict[str, nn.Parameter]:
        """This stage's parameters by logical name."""
        return logical_parameters(self.model)

    def _mine(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        return ((self._own(ids), self._own(targets)) for ids, targets in micro_batches)

    def _clip_and_step(self, lr_kwargs: Any) -> None:
        assert self.clip is not None
        self._norm = self._clip_or_skip(self.clip)
        self._take_step(lr_kwargs)
