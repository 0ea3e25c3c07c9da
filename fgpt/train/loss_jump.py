"""The hook that ends a run whose loss jumps (`train.max_loss_jump`), which few runs have."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from fgpt.config.field_syntax import Ranges, joined_ranges, parse_ranges, ranges_text
from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import run_on_rank0
from fgpt.errors import BadBatchError
from fgpt.report.run_record import read_metrics
from fgpt.train.loop import StepEvent
from fgpt.train.run_dir import METRICS
from fgpt.train.startup import RunContext

LOSSES_IN_MEAN = 20
"""Steps in the mean of which `train.max_loss_jump` is the distance."""


class LossJumpGuard:
    """Ends a run at a step whose loss is too high, before a checkpoint has that step."""

    def __init__(
        self,
        batches: MicroBatches,
        max_jump: float,
        losses: Iterable[float],
        newest: Callable[[], Path | None],
        skipped: Ranges = (),
    ):
        """`max_jump`: above the mean of the LOSSES_IN_MEAN losses before, in nats per token; fewer
        losses have no mean. `losses`: of the steps before the first one. `newest` returns the
        newest checkpoint, on all ranks together. `skipped`: the samples already left out.
        """
        self.batches, self.max_jump, self.newest = batches, max_jump, newest
        self.skipped = skipped
        self.losses = deque(losses, maxlen=LOSSES_IN_MEAN)

    def __call__(self, event: StepEvent) -> None:
        """Raise BadBatchError, equal on every rank, if the loss of this step is too high."""
        if event.result.skipped:
            return
        loss, mean = event.result.loss, fmean(self.losses) if self.losses else math.inf
        if len(self.losses) == LOSSES_IN_MEAN and loss - mean > self.max_jump:
            numbers = self.batches.sample_ids(event.step - 1).ravel().tolist()
            batch = joined_ranges((number, number) for number in numbers)
            left_out = ranges_text(joined_ranges([*self.skipped, *batch]))
            newest = self.newest()
            raise BadBatchError(
                f"step {event.step}: the loss {loss:.4f} is more than {self.max_jump:g} above the"
                f" mean {mean:.4f} of the {LOSSES_IN_MEAN} steps before (train.max_loss_jump);"
                f" samples {ranges_text(batch)}; newest checkpoint before it: {newest or 'none'};"
                f" continue without them with --resume auto --set data.skip_samples={left_out}, or"
                " raise train.max_loss_jump",
                event.step - 1,
                numbers,
            )
        self.losses.append(loss)


def make_loss_jump_guard(
    context: RunContext, batches: MicroBatches, newest: Callable[[], Path | None]
) -> LossJumpGuard:
    """Return the guard of a run that starts or goes on. All ranks call this.

    Its first losses are those that metrics.jsonl has, which a resume has cut back: a step is judged
    as it would be without the interruption.
    """
    run = context.resolved.run
    assert run.train.max_loss_jump is not None

    def losses() -> list[float]:
        return read_metrics(context.path / METRICS).curves().losses[-LOSSES_IN_MEAN:]

    return LossJumpGuard(
        batches,
        run.train.max_loss_jump,
        run_on_rank0(losses, context.device),
        newest,
        parse_ranges(run.data.skip_samples or ""),
    )
