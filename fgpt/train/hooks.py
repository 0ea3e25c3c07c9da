"""The hook that guards against non-finite steps, and the actions: evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from fgpt.checkpoint.manager import Checkpoints
from fgpt.checkpoint.manifest import SaveInfo
from fgpt.config.schema import EvalConfig
from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import agreed
from fgpt.distributed.progress import EVALUATION, SAVING
from fgpt.engine.base import Engine
from fgpt.errors import BadBatchError, TrainingError
from fgpt.inference.evaluate import evaluate
from fgpt.train.loop import DeferredMax, StepEvent
from fgpt.train.metrics import Metrics
from fgpt.utils.files import no_follow

MAX_FAILED_SAVES = 3


class NonFiniteGuard:
    """Ends a run whose steps are all skipped; engines never apply non-finite gradients."""

    def __init__(
        self,
        batches: MicroBatches,
        max_skipped: int,
        dump_dir: Path | None,
        newest: Callable[[], Path | None],
    ):
        """`max_skipped`: consecutive skipped steps that end the run. `dump_dir`: where rank 0
        writes the last sample ids. `newest`: returns the newest checkpoint, on all ranks together.
        """
        self.newest = newest
        self.batches, self.max_skipped, self.dump_dir = batches, max_skipped, dump_dir
        self.skipped_in_a_row = 0
        self.lowest_scale = math.inf

    def __call__(self, event: StepEvent) -> None:
        """Raise TrainingError naming the samples of the last batch, if the run must end."""
        result = event.result
        if not result.skipped:
            self.skipped_in_a_row, self.lowest_scale = 0, 0.0
            if not math.isfinite(result.loss):
                self._fail(event, f"the loss is {result.loss} though its gradients were applied")
            return
        # fp16 starts with too large a scale on purpose: until the first applied step, skipped steps
        # that lower the scale do not count
        scale = result.loss_scale
        if scale is not None and scale < self.lowest_scale:
            self.lowest_scale, self.skipped_in_a_row = scale, 0
        else:
            self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped:
            self._fail(event, f"{self.skipped_in_a_row} steps in a row had non-finite gradients")

    def _fail(self, event: StepEvent, reason: str) -> None:
        ids = self.batches.sample_ids(event.step - 1)
        where = ""
        if self.dump_dir is not None:
            file = self.dump_dir / f"nonfinite_step_{event.step:08d}.json"
            with contextlib.suppress(OSError):  # the non-finite step is the error to report
                with open(file, "w", opener=no_follow) as opened:
                    opened.write(json.dumps({"step": event.step, "samples": ids.tolist()}) + "\n")
                where = f" (sample numbers in {file})"
        raise BadBatchError(
            f"step {event.step}: {reason}, loss {event.result.loss}; samples {ids.min()} to"
            f" {ids.max()}{where}: lower optimizer.params.lr, lengthen the warm-up, or set"
            f" gradient_clipping; newest checkpoint: {self.newest() or 'none'}",
            event.step - 1,
            ids.ravel().tolist(),
        )


class Evaluation:
    """Action: the validation loss, and that of the moving average, every `eval.every` steps."""

    phase = EVALUATION

    def __init__(
        self,
        engine: Engine,
        batches: MicroBatches,
        options: EvalConfig,
        metrics: Metrics | None,
        should_stop: Callable[[], bool],
    ):
        """`metrics`: rank 0's record, None on the other ranks; `should_stop`: see
        `fgpt.inference.evaluate.evaluate`.
        """
        self.engine, self.batches, self.metrics = engine, batches, metrics
        self.every, self.should_stop = options.every, should_stop
        # read a small split once, not several times
        batches_per_epoch = batches.samples_per_epoch // batches.global_batch
        self.n_batches = max(1, min(options.batches, batches_per_epoch))
        self.evaluated_step: int | None = None
        self.loss: float | None = None
        """Of `evaluated_step`, where this process evaluated it."""

    def run(self) -> None:
        """Evaluate, unless this step was evaluated already; nothing is recorded if the run stops
        meanwhile.
        """
        if self.evaluated_step == self.engine.step:
            return
        loss, of_average = self._evaluate(), None
        if loss is not None and self.engine.average is not None:
            with self.engine.averaged():
                of_average = self._evaluate()
            loss = None if of_average is None else loss
        if loss is None:
            return
        self.evaluated_step, self.loss = self.engine.step, loss
        if self.metrics is not None:
            self.metrics.record_evaluation(self.engine.step, loss, of_average)

    def _evaluate(self) -> float | None:
        return evaluate(self.engine, self.batches, self.n_batches, self.should_stop)

    @property
    def current_loss(self) -> float | None:
        """The validation loss of the engine's current step, if it was evaluated."""
        return self.loss if self.evaluated_step == self.engine.step else None


class Saver:
    """Action: a checkpoint, every `checkpoint.every` steps."""

    phase = SAVING

    def __init__(
        self,
        engine: Engine,
        every: int,
        checkpoints: Checkpoints,
        make_info: Callable[[], SaveInfo],
        *,
        last_step: int,
        background: bool,
        report: Callable[..., None],
    ):
        """`make_info` describes the current step, or raises TrainingError. `background`: write
        while training goes on. `report` prints a line.
        """
        self.engine, self.every, self.checkpoints = engine, every, checkpoints
        self.make_info, self.background, self.report = make_info, background, report
        self.last_step = last_step
        self.begun_step: int | None = None
        """Step of the newest checkpoint, or of the one that is being written."""
        self.saved_step: int | None = None
        """Step of the newest checkpoint."""
        self.failed_in_a_row = 0
        self._unwritten = DeferredMax(checkpoints.device, 1)

    def run(self) -> None:
        """Save; a failure is a warning, the third in a row raises TrainingError."""
        self._tolerate(self._finish)
        if self.begun_step != self.engine.step:
            self._tolerate(lambda: self._begin(self.background))
        if not self.background:
            self._tolerate(self._finish)

    def commit_if_written(self) -> None:
        """Complete a save that all ranks have written; called after each step."""
        if self.checkpoints.is_pending and not self._unwritten(not self.checkpoints.is_written()):
            self._tolerate(self._finish)

    def newest(self) -> Path | None:
        """Complete the save under way, and return the newest checkpoint. All ranks call this."""
        self._tolerate(self._finish)
        return self.checkpoints.directory.newest()

    def save_unless_saved(self) -> None:
        """Complete the save under way, and save this step unless that did. Raises TrainingError."""
        self._tolerate(self._finish)
        if self.begun_step != self.engine.step:
            self._begin(background=False)
            self._finish()

    def _begin(self, background: bool) -> None:
        self.checkpoints.begin(self.engine, self.make_info(), background=background)
        self.begun_step = self.engine.step
        self._unwritten = DeferredMax(self.checkpoints.device, 1)

    def _finish(self) -> None:
        try:
            path = self.checkpoints.finish()
        except TrainingError:
            self.begun_step = self.saved_step  # a later save may try this step again
            raise
        if path is not None:
            self.saved_step, self.failed_in_a_row = self.begun_step, 0
            self.report(f"step {self.saved_step:>6}/{self.last_step}  saved {path}")

    def _tolerate(self, save: Callable[[], None]) -> None:
        """Run a part of a save; a failure is a warning, the third in a row raises TrainingError."""
        try:
            save()
        except TrainingError as error:
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= MAX_FAILED_SAVES:
                message = f"{error}; {self.failed_in_a_row} saves failed in a row"
                raise agreed(TrainingError(message)) from error
            self.report(f"{error}; training continues", style="bold red")


@torch.no_grad()
def weights_are_finite(model: torch.nn.Module) -> bool:
    """Return True if this rank's weights (its ZeRO-3 shards) are all finite."""
    local = (getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters())
    return all(bool(torch.isfinite(tensor).all()) for tensor in local)


class BestSaver:
    """Action: a checkpoint after an evaluation with the lowest validation loss so far."""

    phase = SAVING

    def __init__(self, evaluation: Evaluation, saver: Saver, lowest: float | None):
        """`lowest`: validation loss of the best checkpoint of an earlier start."""
        self.evaluation, self.saver = evaluation, saver
        self.every = evaluation.every
        self.lowest = math.inf if lowest is None else lowest

    def run(self) -> None:
        """Save if the evaluation of this step is the best."""
        loss = self.evaluation.current_loss
        if loss is not None and loss < self.lowest:  # NaN is not
            self.lowest = loss
            self.saver.run()
