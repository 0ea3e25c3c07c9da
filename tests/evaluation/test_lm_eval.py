"""The model class of lm-evaluation-harness: whole texts, and texts until a stop string."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.evaluation.test_likelihood import ASCII
from tests.inference.letters import decoder_of
from tests.model.test_gpt import TINY, built

lm_eval = pytest.importorskip("fgpt.evaluation.lm_eval", reason="needs fgpt[lm-eval]")


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.mark.slow  # importing the harness takes seconds
@torch.no_grad()
def test_requests_of_the_harness() -> None:
    from lm_eval.api.registry import get_model

    model = built(TINY, seed=3).eval()
    lm = lm_eval.FgptLM(decoder_of(model), ASCII, 2)
    assert get_model("fgpt") is lm_eval.FgptLM
    # 1. a text longer than the context of 32: each token once, after those of its window
    text = "abcdefgh" * 6
    ids = [0, *ASCII.encode(text)]
    windows = [(0, 0, 32), (48 - 32, 32, 48)]  # first token in the context, first and last counted
    expected = 0.0
    for begin, first, last in windows:
        logits = model(torch.tensor([ids[begin:last]]))[0, first - begin :]
        targets = torch.tensor(ids[first + 1 : last + 1])
        expected -= float(F.cross_entropy(logits, targets, reduction="sum"))
    (found,) = lm.loglikelihood_rolling(requests((text,)))
    assert found == pytest.approx(expected, rel=1e-5)
    # 2. greedy text, until a string or a number of tokens
    (whole,) = lm.generate_until(requests(("ab", {"max_gen_toks": 8, "until": []})))
    assert len(whole) == 8
    (cut,) = lm.generate_until(requests(("ab", {"max_gen_toks": 8, "until": [whole[3]]})))
    assert cut == whole[: whole.index(whole[3])]
    # 3. a pair of texts
    ((nats, _),) = lm.loglikelihood(requests(("ab", "cd")))
    logits = model(torch.tensor([ASCII.encode("abc")]))[0, -2:]
    target = torch.tensor(ASCII.encode("cd"))
    assert nats == pytest.approx(-float(F.cross_entropy(logits, target, reduction="sum")), rel=1e-5)
