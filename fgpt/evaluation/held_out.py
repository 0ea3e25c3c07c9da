"""The loss on a split of a data set: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fgpt.config.schema import DataConfig
from fgpt.data.loader import MicroBatch, MicroBatches
from fgpt.data.token_dataset import BlendedDataset
from fgpt.engine.base import batch_context
from fgpt.evaluation.interval import Estimate, ratio
from fgpt.model.gpt import GPT
from fgpt.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class HeldOutLoss:
    """What `held_out_loss` measured."""

    samples: int
    tokens: int
    n_bytes: int
    """Of the UTF-8 text that the predicted tokens stand for; an end of a document has none."""
    loss: Estimate
    """Nats per token."""
    bits_per_byte: Estimate
    """Independent of the tokenizer, so that models with different ones can be compared."""

    @property
    def perplexity(self) -> Estimate:
        """e to the loss."""
        return self.loss.map(lambda loss: math.exp(loss) if loss < 700 else math.inf)


@torch.inference_mode()
def held_out_loss(
    model: GPT,
    data: BlendedDataset,
    split: str,
    options: DataConfig,
    seq_len: int,
    *,
    device: torch.device,
    batch: int,
    limit: int | None = None,
) -> HeldOutLoss:
    """Return the loss of the first `limit` samples of a split, or of all of one epoch.

    The samples are those of the evaluations in training: same order, packing and masks. Raises
    DataError for a split that is absent or too short.
    """
    samples = data.samples(split, options, seq_len, seed=0)
    n = min(limit or samples.samples_per_epoch, samples.samples_per_epoch)
    bytes_of = torch.from_numpy(bytes_of_ids(data.tokenizer)).to(device)
    nats: list[float] = []
    sizes: list[int] = []
    with MicroBatches(
        samples, micro=min(batch, n), reset_positions=options.reset_positions
    ) as read:
        for micro_batch in _batches(read, n):
            nats += _losses(model, micro_batch, device).sum(dim=1).tolist()
            sizes += bytes_of[micro_batch.targets.to(device)].sum(dim=1).tolist()
    return HeldOutLoss(
        samples=n,
        tokens=n * seq_len,
        n_bytes=sum(sizes),
        loss=ratio(nats, [seq_len] * n),
        bits_per_byte=ratio([each / math.log(2) for each in nats], sizes),
    )


def _batches(read: MicroBatches, n: int) -> Iterator[MicroBatch]:
    """The samples 0 to n - 1."""
    for step in range(-(-n // read.global_batch)):
        (micro_batch,) = read.at(step)
        rows = n - step * read.global_batch
        inputs, targets, begins, positions = micro_batch
        yield MicroBatch(
            inputs[:rows],
            targets[:rows],
            None if begins is None else begins[:rows],
            None if positions is None else positions[:rows],
        )


def _losses(model: GPT, batch: MicroBatch, device: torch.device) -> Tensor:
    """The loss of each token, float32 [B, T]."""
    with model.context.activate(batch_context(batch, device, 0, 0, 0)):
        logits = model(batch.inputs.to(device))  # (B, T, V)
    targets = batch.targets.to(device)
    # one row at a time: float32 logits of a batch take twice the memory of all that is in bf16
    rows = zip(logits, targets, strict=True)
    return torch.stack([F.cross_entropy(row.float(), ids, reduction="none") for row, ids in rows])


def bytes_of_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each id stands for, int64 [vocabulary]; an end of a document has none."""
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    sizes[tokenizer.eod_id] = 0
    return sizes
