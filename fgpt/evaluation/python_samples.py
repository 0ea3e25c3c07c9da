"""The share of generated Python texts that parse."""

from __future__ import annotations

import ast
import codeop
import warnings

from fgpt.evaluation.interval import Estimate, share
from fgpt.inference.decoder import Decoder
from fgpt.inference.generate import Limits, Row, generate
from fgpt.inference.sampling import Sampling
from fgpt.tokenizer.base import Tokenizer

PROMPTS = ("import", "from", "def", "class")
"""Without the blank that follows: most tokenizers join it with the next word."""
SAMPLES, TOKENS = 64, 160
SAMPLING = Sampling(temperature=0.8, top_k=40)


def share_of_python(
    decoder: Decoder, tokenizer: Tokenizer, n: int = SAMPLES, *, batch: int, seed: int
) -> Estimate | None:
    """Return the share of n samples after PROMPTS that parse; None on ranks without the texts.

    Collective for a model that ranks share.
    """
    right = 0
    for begin in range(0, n, batch):
        numbers = range(begin, min(begin + batch, n))
        prompts = [PROMPTS[i % len(PROMPTS)] for i in numbers]
        rows = [
            Row(tokenizer.encode_prompt(prompt), i)  # each sample draws its own tokens
            for i, prompt in zip(numbers, prompts, strict=True)
        ]
        texts = generate(decoder, tokenizer, rows, SAMPLING, Limits(TOKENS), seed=seed)
        right += sum(
            parses(prompt + completion.text)
            for prompt, completion in zip(prompts, texts, strict=False)
        )
    return share(right, n) if decoder.is_rank0 else None


def parses(text: str) -> bool:
    """Whether a text is Python up to its last whole statement, of which it has at least one.

    What follows that statement must be the begin of another: the text may end anywhere.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes are Python all the same
        # the last line may end within a word or a string
        return any(map(_is_begun, (text, text.rpartition("\n")[0]))) and _has_statement(text)


def _is_begun(text: str) -> bool:
    """Whether a text could go on to valid Python, or is that."""
    try:
        codeop.compile_command(text, symbol="exec")
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return True


def _has_statement(text: str) -> bool:
    lines = text.split("\n")
    for n in range(len(lines), 0, -1):
        try:
            return bool(ast.parse("\n".join(lines[:n]) + "\n").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return False
