"""The loss on samples that were held out, always the same ones."""

from __future__ import annotations

import torch

from fgpt.data.loader import MicroBatches
from fgpt.distributed.agreements import mean_over_ranks
from fgpt.engine.base import Engine


def evaluate(engine: Engine, batches: MicroBatches, n_batches: int) -> float:
    """Mean loss in nats per token over the first `n_batches` global batches; equal on all ranks."""
    losses = [engine.eval_batches(batches.at(step)) for step in range(n_batches)]
    return float(mean_over_ranks(torch.stack(losses).mean()))
