"""The model class of lm-evaluation-harness: whole texts, and texts until a stop string."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fgpt.data.token_dataset import open_token_dataset
from fgpt.errors import UserError
from fgpt.tokenizer.load import COPY, save_copy
from tests.convert.models import save_random, small_config
from tests.evaluation.test_likelihood import ASCII
from tests.inference.letters import decoder_of
from tests.model.test_gpt import TINY, built

lm_eval = pytest.importorskip("fgpt.evaluation.lm_eval", reason="needs fgpt[lm-eval]")


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.mark.slow
def test_a_model_by_the_harness_s_own_command(small_data: Path, tmp_path: Path) -> None:
    """`lm_eval --model fgpt --model_args path=RUN,batch_size=3` calls this."""
    from lm_eval.api.registry import get_model

    run = save_random(tmp_path / "run", small_config())
    save_copy(open_token_dataset(small_data).tokenizer, run / COPY)
    lm = get_model("fgpt").create_from_arg_string(f"path={run},batch_size=3")
    assert lm.batch == 3 and len(lm.generate_until(requests(("def", {"max_gen_toks": 4})))) == 1


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
    # prompts longer than the room are cut at their start; equal options go in one batch
    long = requests(*((letter * 60, {"max_gen_toks": 8, "until": []}) for letter in "abc"))
    short = requests(*((letter * 24, {"max_gen_toks": 8, "until": []}) for letter in "abc"))
    assert lm.generate_until(long) == lm.generate_until(short)
    with pytest.raises(UserError, match="generates 32 tokens, and the model's context is 32"):
        lm.generate_until(requests(("ab", {"max_gen_toks": 32})))
    # 3. a pair of texts
    ((nats, _),) = lm.loglikelihood(requests(("ab", "cd")))
    logits = model(torch.tensor([ASCII.encode("abc")]))[0, -2:]
    target = torch.tensor(ASCII.encode("cd"))
    assert nats == pytest.approx(-float(F.cross_entropy(logits, target, reduction="sum")), rel=1e-5)
