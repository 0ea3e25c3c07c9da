"""The loss on held-out samples, the same ones in every evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import mean_over_ranks
from fgpt.engine.base import Engine


def evaluate(
    engine: Engine, batches: MicroBatches, n_batches: int, should_stop: Callable[[], bool]
) -> float | None:
    """Return the mean loss of the first `n_batches` global batches, nats per token. Collective.

    `should_stop`, the same on all ranks, is asked before each batch; None if it says so.
    """
    losses = []
    for step in range(n_batches):
        if should_stop():
            return None
        losses.append(engine.eval_batches(batches.at(step)))
    return float(mean_over_ranks(torch.stack(losses).mean()))
