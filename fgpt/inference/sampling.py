"""From the logits of the next token to a token: greedy, or drawn from a filtered distribution.

B rows, V ids of the tokenizer, C candidates per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The filters apply in the order of these fields, as in transformers."""

    repetition_penalty: float = 1.0
    """Logits of ids that the row has had are divided by it, negative ones multiplied (Keskar et al.
    2019); 1: off."""
    temperature: float = 1.0
    """Logits are divided by it; 0: greedy, the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Only tokens that have at least this part of the largest probability (Nguyen et al. 2024)."""


def make_generator(seed: int, prompt: int, sample: int) -> torch.Generator:
    """Return the random generator of one sample of one prompt, by their numbers.

    Each row has its own, so that a text does not depend on the other rows of its batch.
    """
    mixed = torch.Generator().manual_seed(seed)
    for number in (prompt, sample):  # seeds that differ little give unrelated generators
        word = int(torch.randint(2**62, (), generator=mixed))
        mixed = torch.Generator().manual_seed((word + number) % 2**62)
    return mixed


class Sampler:
    """Chooses the tokens of B rows."""

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        generators: Sequence[torch.Generator],
        vocab_size: int,
        device: torch.device,
    ):
        """`prompts`: ids of each row; `generators`: one per row; `vocab_size`: the tokenizer's."""
        self.sampling, self.generators, self.vocab_size = sampling, generators, vocab_size
        self.seen: Tensor | None = None
        """The ids that each row has had, bool [B, V]; None where nothing depends on them."""
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, ids in enumerate(prompts):
                self.seen[row, torch.tensor(ids, device=device)] = True

    def choose(self, logits: Tensor) -> Tensor:
        """Logits [B, vocabulary of the model] -> ids int64 [B], each below the tokenizer's size,
        whatever the logits are.
        """
        logits = logits[:, : self.vocab_size].float()  # (B, V)
        if self.seen is not None:
            logits = penalize(logits, self.seen, self.sampling.repetition_penalty)
        tokens = self._choose(logits)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _choose(self, logits: Tensor) -> Tensor:
        if self.sampling.temperature == 0:
            return logits.argmax(dim=1)
        probabilities, ids = candidates(logits, self.sampling)  # (B, C)
        draws = torch.cat(
            [torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators]
        )
        # not blocking: the host must not wait for the logits here
        index = draw(probabilities, draws.to(logits.device, non_blocking=True))
        return index if ids is None else ids.gather(1, index[:, None])[:, 0]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits [B, V] with those where `seen`, bool [B, V], made less likely."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities of each row's candidates, [B, C], and their ids, int64 [B, C].

    Probabilities do not sum to 1, and are 0 for tokens that a filter has removed; ids None: the
    candidates are all ids in order. `logits`: float32 [B, V], temperature above 0.
    """
    # the largest becomes 0: no quotient is infinite but those whose probability is 0
    logits = logits - logits.amax(dim=1, keepdim=True)
    logits = logits / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    ids = None
    # 1. top-k; only it and top-p need an order
    if 0 < sampling.top_k < logits.shape[1]:
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(dim=1, descending=True)
    probabilities = logits.softmax(dim=1)
    largest = probabilities.max(dim=1, keepdim=True).values
    # 2. top-p: a token stays while the more likely ones have less than that together
    if sampling.top_p < 1:
        before = probabilities.cumsum(dim=1) - probabilities
        removed = before >= sampling.top_p
        removed[:, 0] = False
        probabilities = probabilities.masked_fill(removed, 0.0)
    # 3. min-p, whose ratio is that of the logits
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * largest, 0.0)
    return probabilities, ids


def draw(weights: Tensor, draws: Tensor) -> Tensor:
    """Return the index in each row of weights [B, C] at which their sum passes the fraction
    draws [B] in [0, 1) of the row's total; int64 [B]. Weights that are not numbers give any index.
    """
    sums = weights.double().cumsum(dim=1)
    totals = sums[:, -1:].contiguous()
    # right: a weight of 0 is never chosen
    index = torch.searchsorted(sums, draws[:, None] * totals, right=True)[:, 0]
    # a rounded product may reach the total: then the last weight that is not 0
    last = torch.searchsorted(sums, totals)[:, 0]
    return torch.minimum(index, last).clamp(max=weights.shape[1] - 1)
