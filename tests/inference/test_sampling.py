"""Sampling against transformers' logits processors, and the distribution of what is drawn."""

from __future__ import annotations

import pytest
import torch

from fgpt.inference.sampling import (
    Sampler,
    Sampling,
    candidates,
    draw,
    make_generator,
    penalize,
)


def random_logits(rows=6, size=50, seed=0):
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def in_order(probabilities, ids, size):
    """Normalized probabilities of all ids."""
    if ids is not None:
        unordered = torch.zeros(len(probabilities), size)
        probabilities = unordered.scatter(1, ids, probabilities)
    return probabilities / probabilities.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"top_p": 1e-9},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.6, "min_p": 0.1},
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(options):
    processors = pytest.importorskip("transformers").generation.logits_process
    sampling, logits = Sampling(**options), random_logits()
    chain = [processors.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        chain.append(processors.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(processors.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(processors.MinPLogitsWarper(sampling.min_p))
    wanted = processors.LogitsProcessorList(chain)(None, logits.clone()).softmax(dim=1)
    got = in_order(*candidates(logits, sampling), 50)
    torch.testing.assert_close(got, wanted)
    assert ((got > 0) == (wanted > 0)).all()


def test_the_repetition_penalty_is_that_of_transformers():
    processors = pytest.importorskip("transformers").generation.logits_process
    logits, ids = random_logits(3), torch.tensor([[1, 4, 4], [7, 8, 9], [0, 49, 0]])
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    wanted = processors.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    torch.testing.assert_close(penalize(logits, seen, 1.7), wanted)
    sampler = Sampler(Sampling(1.7, temperature=0), ids.tolist(), [], 50, logits.device)
    first = sampler.choose(logits)
    ids = torch.cat((ids, first[:, None]), dim=1)
    wanted = processors.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    assert sampler.choose(logits).equal(wanted.argmax(dim=1))


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, 4)
    generators = [make_generator(3, prompt, 0) for prompt in range(4000)]
    sampler = Sampler(Sampling(), [[0]] * 4000, generators, 4, logits.device)
    counts = torch.bincount(sampler.choose(logits), minlength=4)
    torch.testing.assert_close(counts / 4000, logits[0].softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1e-39, 1e-300, 1e-6])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_small_temperature_draws_the_most_likely(temperature, filters):
    logits = random_logits()
    generators = [make_generator(0, prompt, 0) for prompt in range(6)]
    sampling = Sampling(temperature=temperature, **filters)
    sampler = Sampler(sampling, [[0]] * 6, generators, 50, logits.device)
    assert sampler.choose(logits).equal(logits.argmax(dim=1))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_logits_that_are_not_finite_give_a_token_of_the_vocabulary(value, filters):
    logits = random_logits(2, 7)
    logits[0, 3], logits[1] = float(value), float(value)
    generators = [make_generator(0, prompt, 0) for prompt in range(2)]
    sampler = Sampler(Sampling(1.2, **filters), [[0]] * 2, generators, 7, logits.device)
    assert all(0 <= token < 7 for token in sampler.choose(logits).tolist())


def test_what_is_removed_is_never_drawn():
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for fraction, wanted in [(0.0, 1), (0.2999, 1), (0.3001, 3), (1 - 2**-53, 3)]:
        assert draw(weights, torch.tensor([fraction], dtype=torch.float64)).tolist() == [wanted]


def test_greedy_is_the_argmax_below_the_vocabulary():
    logits = random_logits()
    logits[:, 40:] += 100
    sampler = Sampler(Sampling(temperature=0), [[0]] * 6, [], 40, logits.device)
    assert sampler.choose(logits).equal(logits[:, :40].argmax(dim=1))


def test_generators_differ_in_each_number():
    numbers = [(s, p, n) for s in range(3) for p in range(3) for n in range(3)]
    drawn = {float(torch.rand(1, generator=make_generator(*each))) for each in numbers}
    assert len(drawn) == 27
    assert torch.rand(1, generator=make_generator(1, 2, 0)).item() in drawn
