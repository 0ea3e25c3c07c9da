"""The log-likelihood of texts after contexts, and what a model answers by it.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fgpt.errors import DataError
from fgpt.evaluation.interval import Estimate, ratio, share
from fgpt.evaluation.questions import QuestionFile
from fgpt.tokenizer.base import Tokenizer

Logits = Callable[[Tensor], Tensor | None]
"""int64 [B, T] -> logits [B, T, V] of the next tokens; None on the ranks that do not get them."""


class Continuation(NamedTuple):
    """Tokens whose likelihood is asked for, after others."""

    context: Sequence[int]
    """At least one id."""
    ids: Sequence[int]
    """At least one id."""


class Likelihood(NamedTuple):
    """Of a continuation."""

    nats: float
    """Log-likelihood, at most 0."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


def log_likelihoods(
    logits: Logits,
    continuations: Sequence[Continuation],
    *,
    max_seq_len: int,
    device: torch.device,
    batch: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Likelihood]:
    """Return the log-likelihood of each. All ranks of a model call this together; those that do
    not get the logits return an empty list.

    What is longer than the context is cut at its start. `should_stop`, the same on all ranks, is
    asked before each batch; then the list is empty.
    """
    # 1. the longest first: rows of a batch have similar lengths, and memory is enough for all
    rows = [([*c.context, *c.ids][-max_seq_len - 1 :], c) for c in continuations]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    found: list[Likelihood | None] = [None] * len(rows)
    for begin in range(0, len(order), batch):
        if should_stop():
            return []
        numbers = order[begin : begin + batch]
        # 2. padding on the right is never attended to
        width = len(rows[numbers[0]][0]) - 1
        padded = [(rows[i][0] + [0] * width)[:width] for i in numbers]
        output = logits(torch.tensor(padded, device=device))  # (B, T, V)
        if output is None:
            continue
        for i, row in zip(numbers, output, strict=True):
            ids, continuation = rows[i]
            n = min(len(continuation.ids), len(ids) - 1)
            at = row[len(ids) - 1 - n : len(ids) - 1].float()
            targets = torch.tensor(ids[-n:], device=at.device)
            nats = at.log_softmax(dim=-1).gather(1, targets[:, None]).sum()
            found[i] = Likelihood(float(nats), bool((at.argmax(dim=-1) == targets).all()))
    return [each for each in found if each is not None]


def encode_pair(tokenizer: Tokenizer, context: str, text: str) -> Continuation:
    """Return the ids of a text after a context, as they are in the whole.

    Spaces at the end of the context belong to the text: most tokenizers join them with the word.
    """
    kept = context.rstrip()
    text, context = context[len(kept) :] + text, kept
    if not context:
        return Continuation(tokenizer.encode_prompt(""), tokenizer.encode(text))
    whole, before = tokenizer.encode_prompt(context + text), tokenizer.encode_prompt(context)
    if not 0 < len(before) < len(whole):  # a token reaches over the border
        return Continuation(before or [tokenizer.eod_id], tokenizer.encode(text))
    return Continuation(whole[: len(before)], whole[len(before) :])


@dataclass(frozen=True)
class Answers:
    """How a model answered the questions of a file."""

    name: str
    n: int
    accuracy: Estimate
    """Share of questions whose most likely choice is right; without choices: whose answer is the
    model's own, token by token."""
    accuracy_by_length: Estimate | None
    """As `accuracy`, by likelihood per character of a choice, as lm-evaluation-harness's acc_norm;
    None without choices."""
    nats_per_answer: Estimate
    """Negative log-likelihood of the right answers."""

    def estimates(self) -> dict[str, Estimate]:
        """What there is of them, by name."""
        by_length = (
            {}
            if self.accuracy_by_length is None
            else {"accuracy_by_length": self.accuracy_by_length}
        )
        return {"accuracy": self.accuracy, **by_length, "nats_per_answer": self.nats_per_answer}


def answer(
    logits: Logits,
    tokenizer: Tokenizer,
    file: QuestionFile,
    *,
    max_seq_len: int,
    device: torch.device,
    batch: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Answers | None:
    """Answer the questions of a file by likelihood; None on ranks without the logits, and if it
    should stop. Collective as `log_likelihoods`. Raises DataError for a choice without tokens.
    """
    pairs = []
    for number, question in enumerate(file.questions, 1):
        for choice in question.choices:
            pairs.append(encode_pair(tokenizer, question.context, choice))
            n, where = len(pairs[-1].ids), f"{file.name}: question {number}"
            if n == 0:
                raise DataError(f"{where}: the tokenizer has no token for {choice!r}")
            if n > max_seq_len:
                raise DataError(
                    f"{where}: a choice has {n} tokens, the model's context is {max_seq_len}"
                )
    found = iter(
        log_likelihoods(
            logits,
            pairs,
            max_seq_len=max_seq_len,
            device=device,
            batch=batch,
            should_stop=should_stop,
        )
    )
    right = right_norm = 0
    nats: list[float] = []
    for question in file.questions:
        scores = [score for _, score in zip(question.choices, found, strict=False)]
        if not scores:
            return None
        nats.append(-scores[question.answer].nats)
        if not file.has_choices:
            right += scores[0].is_greedy
            continue
        per_character = [
            score.nats / max(1, len(choice.lstrip()))
            for score, choice in zip(scores, question.choices, strict=True)
        ]
        right += _best([score.nats for score in scores]) == question.answer
        right_norm += _best(per_character) == question.answer
    n = len(file.questions)
    return Answers(
        file.name,
        n,
        share(right, n),
        share(right_norm, n) if file.has_choices else None,
        ratio(nats, [1] * n),
    )


def _best(scores: Sequence[float]) -> int:
    """Index of the highest score; a model that is not a number has no best answer."""
    return -1 if any(map(math.isnan, scores)) else max(range(len(scores)), key=scores.__getitem__)
