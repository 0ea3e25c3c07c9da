"""A tokenizer of single characters, and generation with random small models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fgpt.config.schema import ModelConfig
from fgpt.inference.decoder import Decoder
from fgpt.inference.generate import Completion, Limits, Row, generate
from fgpt.inference.sampling import Sampler, Sampling, make_generator
from fgpt.model.gpt import GPT
from fgpt.tokenizer.base import Ids, Tokenizer

CPU = torch.device("cpu")
TWELVE = Limits(12)
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(repetition_penalty=1.2, temperature=1.5, top_k=60, top_p=0.95, min_p=0.001)


class Letters(Tokenizer):
    """Id i is the character U+0100 + i; id 0 ends a document."""

    vocab_size, eod_id, eod = 90, 0, "\u0100"

    def __init__(self) -> None:
        super().__init__(b"", "text")

    def encode_with_library(self, texts: list[bytes]) -> Ids:
        letters = [text.decode() for text in texts]
        ids = [ord(letter) - 0x100 for text in letters for letter in text]
        return np.array(ids, dtype=np.uint32), np.array([len(text) for text in letters])

    def id_to_token(self, i: int) -> str:
        return chr(0x100 + i)

    def token_bytes(self, i: int) -> bytes:
        return self.id_to_token(i).encode()

    def _decode(self, ids: list[int]) -> str:
        return "".join(map(self.id_to_token, ids))


LETTERS = Letters()


def decoder_of(model: GPT) -> Decoder:
    """The decoder of a model on the CPU."""
    dtype = next(model.parameters()).dtype
    return Decoder(model.eval().layers(), model.config, CPU, dtype)


def generated(
    decoder: Decoder,
    rows: Sequence[Row],
    sampling: Sampling = GREEDY,
    limits: Limits = TWELVE,
    **more: Any,
) -> list[Completion]:
    """Texts of letters."""
    return generate(decoder, LETTERS, rows, sampling, limits, **more)


@torch.no_grad()
def uncached(
    model: GPT, row: Row, sampling: Sampling = GREEDY, n: int = 12, seed: int = 0
) -> list[int]:
    """The slow twin: a whole forward pass for each token, no batch, no cache."""
    model.eval()
    generator = make_generator(seed, row.prompt, row.sample)
    sampler = Sampler(sampling, [row.prompt_ids], [generator], LETTERS.vocab_size, CPU)
    ids = list(row.prompt_ids)
    while len(ids) < min(model.config.max_seq_len, len(row.prompt_ids) + n):
        token = int(sampler.choose(model(torch.tensor([ids]))[:, -1]))
        if token == LETTERS.eod_id:
            break
        ids.append(token)
    return ids[len(row.prompt_ids) :]


def rows_of(config: ModelConfig, lengths: Sequence[int] = (3, 11, 1, 20)) -> list[Row]:
    """Prompts of these lengths, two samples of the last one."""
    generator = torch.Generator().manual_seed(7)
    prompts = [
        torch.randint(1, LETTERS.vocab_size, (n,), generator=generator).tolist() for n in lengths
    ]
    return [Row(ids, i) for i, ids in enumerate(prompts)] + [Row(prompts[-1], len(prompts) - 1, 1)]
