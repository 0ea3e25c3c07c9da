"""Generation against a loop without a cache, and its limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fgpt.inference.generate import generate, sample_token
from tests.model.test_gpt import LLAMA, TINY, built

CPU = torch.device("cpu")


@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["gpt2", "llama"])
def test_greedy_is_the_argmax_of_whole_forwards(config):
    model = built(config, seed=3)
    prompt = [5, 17, 80]
    ids = list(prompt)
    model.eval()
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(model, config, prompt, 12, device=CPU, temperature=0) == ids[3:]


def test_the_same_seed_draws_the_same_text():
    model = built(TINY)

    def text(seed):
        return generate(model, TINY, [1], 20, device=CPU, seed=seed)

    assert text(1) == text(1) != text(2)


def test_stops_at_max_seq_len_and_truncates_long_prompts_on_the_left():
    model = built(TINY)
    long = list(range(50))  # the context is 32
    assert len(generate(model, TINY, long, 9, device=CPU)) == 1
    assert len(generate(model, TINY, [1, 2], 99, device=CPU)) == TINY.max_seq_len - 2
    truncated = generate(model, TINY, long, 1, device=CPU, temperature=0)
    assert truncated == generate(model, TINY, long[-31:], 1, device=CPU, temperature=0)


def test_stops_before_the_stop_token_and_below_the_tokenizers_vocabulary():
    model = built(TINY)
    free = generate(model, TINY, [1], 20, device=CPU, seed=4)
    stop = free[7]
    cut = generate(model, TINY, [1], 20, device=CPU, seed=4, stop_id=stop)
    assert cut == free[: free.index(stop)]
    few = generate(model, TINY, [1], 25, device=CPU, vocab_size=3)
    assert max(few) < 3


def test_restores_the_training_mode():
    model = built(replace(TINY, dropout=0.5))
    model.train()
    generate(model, TINY, [1], 3, device=CPU)
    assert model.training


def test_draw_follows_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample_token(logits, 1.0, 0, generator)] += 1
    torch.testing.assert_close(counts / 4000, logits.softmax(0), atol=0.03, rtol=0)
    assert {sample_token(logits, 1.0, 2, generator) for _ in range(50)} == {1, 2}
    assert sample_token(logits, 0, 0, generator) == 2
