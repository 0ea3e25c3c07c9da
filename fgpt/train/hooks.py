"""What happens after a step besides training: guarding, evaluating, saving."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from fgpt.config.schema import EvalConfig
from fgpt.data.loader import MicroBatches
from fgpt.engine.base import Engine
from fgpt.errors import TrainingError
from fgpt.inference.evaluate import evaluate
from fgpt.train.loop import StepEvent
from fgpt.train.metrics import Metrics

MAX_FAILED_SAVES = 3


class NonFiniteGuard:
    """Stops a run that only skips steps; an engine never applies non-finite gradients."""

    def __init__(self, batches: MicroBatches, max_skipped: int, dump: Path | None):
        """`max_skipped`: steps in a row; `dump`: where rank 0 writes the last batch's samples."""
        self.batches, self.max_skipped, self.dump = batches, max_skipped, dump
        self.in_a_row = 0
        self.lowest_scale = math.inf

    def __call__(self, event: StepEvent) -> None:
        """Raises TrainingError with the samples of the last batch, dumped by rank 0."""
        result = event.result
        if not result.skipped:
            self.in_a_row, self.lowest_scale = 0, 0.0
            if not math.isfinite(result.loss):
                self._stop(event, f"the loss is {result.loss} though its gradients were applied")
            return
        # fp16 starts with a scale that is too large on purpose: steps that lower it do not count
        # until one has been applied
        scale = result.loss_scale
        if scale is not None and scale < self.lowest_scale:
            self.lowest_scale, self.in_a_row = scale, 0
        else:
            self.in_a_row += 1
        if self.in_a_row >= self.max_skipped:
            self._stop(event, f"{self.in_a_row} steps in a row had non-finite gradients")

    def _stop(self, event: StepEvent, what: str) -> None:
        ids = self.batches.sample_ids(event.step - 1)
        where = ""
        if self.dump is not None:
            file = self.dump / f"nonfinite_step_{event.step:08d}.json"
            with contextlib.suppress(OSError):  # the error to report is the other one
                file.write_text(json.dumps({"step": event.step, "samples": ids.tolist()}) + "\n")
                where = f" (sample numbers in {file})"
        raise TrainingError(
            f"step {event.step}: {what}, loss {event.result.loss}; samples {ids.min()} to"
            f" {ids.max()}{where}: lower optimizer.params.lr, lengthen the warm-up, or set"
            " gradient_clipping; the last checkpoint is untouched"
        )


class Evaluation:
    """The validation loss, every so many steps."""

    def __init__(
        self, engine: Engine, batches: MicroBatches, options: EvalConfig, metrics: Metrics | None
    ):
        """`metrics`: rank 0's record, None on the other ranks."""
        self.engine, self.batches, self.metrics = engine, batches, metrics
        self.every = options.every
        # a small split is read once, not over and over
        self.n_batches = max(
            1, min(options.batches, batches.samples_per_epoch // batches.global_batch)
        )
        self.last_step: int | None = None

    def due(self, step: int) -> bool:
        """Whether it is time."""
        return self.every > 0 and step % self.every == 0

    def now(self) -> None:
        """Evaluate unless this step has been evaluated."""
        if self.last_step == self.engine.step:
            return
        self.last_step = self.engine.step
        loss = evaluate(self.engine, self.batches, self.n_batches)
        if self.metrics is not None:
            self.metrics.evaluated(self.engine.step, loss)


class Saver:
    """A checkpoint, every so many steps; never one with non-finite weights."""

    def __init__(
        self, engine: Engine, every: int, save: Callable[[], None], warn: Callable[[str], None]
    ):
        self.engine, self.every, self.save, self.warn = engine, every, save, warn
        self.saved_step: int | None = None
        self.failed = 0

    def due(self, step: int) -> bool:
        """Whether it is time."""
        return self.every > 0 and step % self.every == 0

    def now(self) -> None:
        """Save. A failed save is reported and training goes on; the third in a row ends the run."""
        try:
            self.save_final()
        except TrainingError as error:
            self.failed += 1
            if self.failed >= MAX_FAILED_SAVES:
                raise TrainingError(f"{error}; {self.failed} saves failed in a row") from error
            self.warn(f"{error}; training goes on, the previous checkpoint stays")

    def save_final(self) -> None:
        """Save unless this step has been saved; raises TrainingError: nothing comes after it."""
        if self.saved_step != self.engine.step:
            self.save()
            self.saved_step, self.failed = self.engine.step, 0


@torch.no_grad()
def weights_are_finite(model: torch.nn.Module) -> bool:
    """Whether this rank's (part of the) weights are all finite numbers."""
    parts = (getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters())
    return all(bool(torch.isfinite(part).all()) for part in parts)
