"""Autoregressive generation with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.model.kv_cache import make_kv_cache


@torch.no_grad()
def generate(
    model: nn.Module,
    config: ModelConfig,
    prompt: Sequence[int],
    n_tokens: int,
    *,
    device: torch.device,
    temperature: float = 1.0,
    top_k: int = 0,
    vocab_size: int | None = None,
    stop_id: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Continue `prompt` (at least one id) by up to `n_tokens` ids; returns the new ids.

    Deterministic given `seed`, so that all ranks gather sharded weights in the same order. Never
    samples ids from `vocab_size` (the tokenizer's) on. Stops at `stop_id`, or when the context is
    full. A prompt longer than the context is cut at its start.
    """
    was_training = model.training
    model.eval()
    context = list(prompt)[-(config.max_seq_len - 1) :]
    room = min(n_tokens, config.max_seq_len - len(context))
    cache = make_kv_cache(config, 1, len(context) + room, device, next(model.parameters()).dtype)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([context], device=device)  # (1, T)
    new_ids: list[int] = []
    for _ in range(room):
        logits = model(ids, cache=cache)[0].float().cpu()  # (V,)
        token = sample_token(logits[:vocab_size], temperature, top_k, generator)
        if token == stop_id:
            break
        new_ids.append(token)
        ids = torch.tensor([[token]], device=device)
    model.train(was_training)
    return new_ids


def sample_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Sample one id from float32 logits [V]; temperature 0 returns the argmax."""
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        threshold = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    weights = (logits / temperature).softmax(dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))
