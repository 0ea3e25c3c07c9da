"""Text from a model: batches of prompts of different lengths, token by token.

B rows, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fgpt.errors import TrainingError
from fgpt.inference.decoder import Decoder
from fgpt.inference.sampling import Sampler, Sampling, make_generator
from fgpt.inference.text_stream import TextStream
from fgpt.model.kv_cache import KVCache
from fgpt.tokenizer.base import Tokenizer


class Row(NamedTuple):
    """One text to generate."""

    prompt_ids: Sequence[int]
    """At least one id."""
    prompt: int = 0
    """Number of its prompt."""
    sample: int = 0
    """Number of this sample of the prompt. Both numbers, with the seed, determine what is drawn."""


@dataclass(frozen=True)
class Limits:
    """Where a text ends, besides the end-of-document token and the end of the context."""

    max_tokens: int = 256
    """Tokens to generate, at least 1."""
    stop: tuple[str, ...] = ()
    """Strings before which the text ends; none is empty."""


class Completion(NamedTuple):
    """One generated text."""

    text: str
    """Without the prompt, stop string, end-of-document token, and bytes that are no character."""
    ids: list[int]
    """The generated tokens, without the end-of-document token."""
    stop_reason: str
    """end of document, stop string, max_tokens, context is full, or interrupted."""


GOES_ON, DONE, NOT_FINITE = range(3)
"""What rank 0 tells the others with each token."""


def never() -> bool:
    """Return False: the default of `should_stop`."""
    return False


def show_nothing(row: int, piece: str) -> None:
    """The default of `on_text`."""


@torch.no_grad()
def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    sampling: Sampling,
    limits: Limits,
    *,
    seed: int = 0,
    on_text: Callable[[int, str], object] = show_nothing,
    should_stop: Callable[[], bool] = never,
) -> list[Completion]:
    """Return a text for each row, on rank 0. All ranks call this together; rank 0 decides.

    A prompt longer than the context is cut at its start, so that one token fits. `on_text(row,
    piece)` gets the texts as they grow, in pieces of whole characters; `should_stop` is asked
    before each token. Both are called on rank 0 only. Raises TrainingError on all ranks if logits
    are not finite.
    """
    # 1. the prompts
    context = decoder.config.max_seq_len
    prompts = [cut_to_context(row.prompt_ids, context) for row in rows]
    n_new = [min(limits.max_tokens, context - len(prompt)) for prompt in prompts]
    logits, cache = _decode_prompts(decoder, prompts, max(n_new))
    # 2. rank 0 chooses tokens until all texts have ended
    texts: list[_Text] = []
    if decoder.is_rank0:
        generators = [make_generator(seed, row.prompt, row.sample) for row in rows]
        size = min(tokenizer.vocab_size, decoder.config.vocab_size)
        sampler = Sampler(sampling, prompts, generators, size, decoder.device)
        texts = [_Text(tokenizer, p, n, limits) for p, n in zip(prompts, n_new, strict=True)]
    state = GOES_ON
    while True:
        tokens = torch.zeros(len(rows) + 1, dtype=torch.int64, device=decoder.device)
        if logits is not None and decoder.is_rank0:
            tokens[:-1] = sampler.choose(logits)
            tokens[-1] = logits.isfinite().all()
            *chosen, is_finite = tokens.tolist()  # a device is waited for here only
            state = _extend(texts, chosen, on_text, should_stop) if is_finite else NOT_FINITE
            tokens[-1] = state
        # 3. the others follow it
        tokens = decoder.from_rank0(tokens)
        state = state if decoder.is_rank0 else int(tokens[-1])
        if state != GOES_ON:
            break
        logits = decoder.decode(tokens[:-1, None], cache)
    if state == NOT_FINITE:
        raise TrainingError(_not_finite(decoder.dtype))
    return [Completion(text.stream.text, text.ids, text.stop_reason) for text in texts]


def _decode_prompts(
    decoder: Decoder, prompts: Sequence[Sequence[int]], n_new: int
) -> tuple[Tensor | None, KVCache]:
    """Return the logits [B, V] of the first new token, on rank 0, and the cache of all rows, with
    room for `n_new` tokens. Rows with the same prompt share the work on it.
    """
    # 1. all rows end in the same column
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    cache = decoder.new_cache(padding, longest + n_new)
    numbers = {prompt: n for n, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    is_shared = longest > 1 and len(numbers) < len(prompts)
    padded = [[0] * (longest - len(p)) + [*p] for p in (numbers if is_shared else prompts)]
    ids = torch.tensor(padded, device=decoder.device)  # (B, T)
    if not is_shared:
        return decoder.decode(ids, cache), cache
    # 2. each prompt once, then its keys, values and logits for each of its rows
    once = decoder.new_prompt_cache([longest - len(prompt) for prompt in numbers], longest)
    logits = decoder.decode(ids, once)
    rows = torch.tensor([numbers[tuple(prompt)] for prompt in prompts], device=decoder.device)
    cache.copy_rows(once, rows)
    return None if logits is None else logits[rows], cache


def cut_to_context(ids: Sequence[int], context: int) -> Sequence[int]:
    """Return the end of a prompt that leaves room for one token in the context."""
    return ids[-max(1, context - 1) :]


class _Text:
    """One text as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], n_new: int, limits: Limits):
        self.stream = TextStream(tokenizer, prompt, limits.stop)
        self.ids: list[int] = []
        self.stop_reason = ""
        self.n_new, self.eod_id = n_new, tokenizer.eod_id
        self.last_reason = "max_tokens" if n_new == limits.max_tokens else "context is full"

    def add(self, token: int) -> str:
        """Add a token; return the text that is complete with it."""
        if token == self.eod_id:
            return self.end("end of document")
        self.ids.append(token)
        piece = self.stream.add(token)
        if self.stream.stopped:
            self.stop_reason = "stop string"
        elif len(self.ids) == self.n_new:
            piece += self.end(self.last_reason)
        return piece

    def end(self, reason: str) -> str:
        """End the text; return the rest of it."""
        rest = self.stream.finish()
        self.stop_reason = "stop string" if self.stream.stopped else reason
        return rest


def _extend(
    texts: Sequence[_Text],
    tokens: Iterable[int],
    on_text: Callable[[int, str], object],
    should_stop: Callable[[], bool],
) -> int:
    """Add a token to each text that has not ended; return DONE once all have, else GOES_ON."""
    for row, (text, token) in enumerate(zip(texts, tokens, strict=True)):
        if not text.stop_reason and (piece := text.add(token)):
            on_text(row, piece)
    if should_stop():
        for row, text in enumerate(texts):
            if not text.stop_reason and (piece := text.end("interrupted")):
                on_text(row, piece)
    return DONE if all(text.stop_reason for text in texts) else GOES_ON


def _not_finite(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "the logits are not finite in fp16: use --dtype fp32 or bf16"
    return "the logits are not finite: training has diverged: use an earlier checkpoint"
