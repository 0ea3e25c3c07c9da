"""The loss on held-out samples, the same ones in every evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import mean_over_ranks
from fgpt.engine.base import Engine


def evaluate(
    engine: Engine, batches: MicroBatches, n_batches: int, after_batch: Callable[[], None]
) -> float:
    """Return the mean loss of the first `n_batches` global batches, nats per token. Collective."""
    losses = []
    for step in range(n_batches):
        losses.append(engine.eval_batches(batches.at(step)))
        after_batch()
    return float(mean_over_ranks(torch.stack(losses).mean()))
