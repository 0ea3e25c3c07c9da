"""The loss on held-out samples, the same ones in every evaluation."""

from __future__ import annotations

import torch

from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import mean_over_ranks
from fgpt.engine.base import Engine


def evaluate(engine: Engine, batches: MicroBatches, n_batches: int) -> float:
    """Return the mean loss of the first `n_batches` global batches, nats per token. Collective."""
    losses = [engine.eval_batches(batches.at(step)) for step in range(n_batches)]
    return float(mean_over_ranks(torch.stack(losses).mean()))
