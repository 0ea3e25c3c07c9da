"""Likelihoods, intervals and questions, against one forward pass at a time and by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fgpt.errors import DataError
from fgpt.evaluation.interval import ratio, share
from fgpt.evaluation.likelihood import Continuation, answer, encode_pair, log_likelihoods
from fgpt.evaluation.python_samples import parses
from fgpt.evaluation.questions import Question, QuestionFile, read_questions
from fgpt.tokenizer.base import Ids, Tokenizer
from tests.model.test_gpt import LLAMA, TINY, built

CPU = torch.device("cpu")


class Ascii(Tokenizer):
    """Id i is the character 31 + i; id 0 ends a document."""

    vocab_size, eod_id, eod = 96, 0, "\x1f"

    def __init__(self) -> None:
        super().__init__(b"", "text")

    def encode_with_library(self, texts: list[bytes]) -> Ids:
        ids = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.uint32) - 31
        return ids, np.array([len(text) for text in texts])

    def id_to_token(self, i: int) -> str:
        return chr(31 + i)

    def token_bytes(self, i: int) -> bytes:
        return self.id_to_token(i).encode()

    def _decode(self, ids: list[int]) -> str:
        return "".join(map(self.id_to_token, ids))


ASCII = Ascii()


@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_each_likelihood_is_that_of_one_forward_pass(config: Any) -> None:
    model = built(config, seed=5).eval()
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, 2), (1, 7), (20, 1), (5, 5), (40, 3), (2, 40)]  # the context is 32
    pairs = [
        Continuation(*(torch.randint(0, 96, (n,), generator=generator).tolist() for n in size))
        for size in sizes
    ]
    # one more, of the model's own choice
    greedy = int(model(torch.tensor([[4, 5]]))[0, -1].argmax())
    pairs.append(Continuation([4, 5], [greedy]))
    found = {
        batch: log_likelihoods(model, pairs, max_seq_len=32, device=CPU, batch=batch)
        for batch in (1, 3, 8)
    }
    for i, pair in enumerate(pairs):
        ids = [*pair.context, *pair.ids][-33:]
        n = min(len(pair.ids), 32)
        logits = model(torch.tensor([ids[:-1]]))[0, -n:]
        nats = -float(F.cross_entropy(logits, torch.tensor(ids[-n:]), reduction="sum"))
        for each in found.values():
            assert each[i].nats == pytest.approx(nats, rel=1e-5)
            assert each[i].is_greedy == (logits.argmax(-1).tolist() == ids[-n:])
    assert found[3][-1].is_greedy and not all(each.is_greedy for each in found[3])


def test_spaces_belong_to_the_word_that_follows() -> None:
    assert encode_pair(ASCII, "a b ", "c") == (ASCII.encode("a b"), ASCII.encode(" c"))
    assert encode_pair(ASCII, "a b", " c") == (ASCII.encode("a b"), ASCII.encode(" c"))
    assert encode_pair(ASCII, "", "c") == ([0], ASCII.encode("c"))


class Joining(Ascii):
    """`in` and `to` together are one token; `#` is dropped."""

    def encode(self, text: str) -> list[int]:
        if text == "into":
            return [90]
        return super().encode(text.replace("#", ""))


def test_a_token_over_the_border() -> None:
    tokenizer = Joining()
    assert encode_pair(tokenizer, "in", "to") == (ASCII.encode("in"), ASCII.encode("to"))
    file = QuestionFile("t", "choices", (Question("x", ("a", "#"), 0),))
    with pytest.raises(DataError, match="t: question 1: the tokenizer has no token for '#'"):
        answer(prefers("a"), tokenizer, file, max_seq_len=32, device=CPU, batch=2)
    file = QuestionFile("t", "choices", (Question("x", ("a", "a" * 33), 0),))
    with pytest.raises(DataError, match="t: question 1: a choice has 33 tokens, .* is 32"):
        answer(prefers("a"), ASCII, file, max_seq_len=32, device=CPU, batch=2)


def prefers(letter: str) -> Any:
    """Logits that give a letter probability 1/2, and the other 95 ids the rest."""

    def logits(ids: Tensor) -> Tensor:
        scores = torch.zeros(*ids.shape, 96)
        scores[..., ASCII.encode(letter)[0]] = math.log(95)
        return scores

    return logits


def test_answers_by_hand() -> None:
    questions = (
        Question("x", (" b", " aaa"), 1),  # each letter a costs log 2, any other log 190
        Question("x", (" b", " a"), 1),
        Question("x", (" a", " b"), 1),
    )
    file = QuestionFile("t", "choices", questions)
    found = answer(prefers("a"), ASCII, file, max_seq_len=32, device=CPU, batch=2)
    assert found is not None and found.accuracy_by_length is not None
    other = math.log(190)  # nats of any letter but a
    costs = [other + 3 * math.log(2), other + math.log(2), other + other]
    assert found.nats_per_answer.value == pytest.approx(sum(costs) / 3, rel=1e-5)
    # " aaa" costs other + 3 log 2 = 7.3, " b" 2 other = 10.5: right; the third is wrong
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert found.accuracy_by_length.value == pytest.approx(2 / 3)
    words = QuestionFile("t", "LAMBADA", (Question("x", ("aa",), 0), Question("x", ("ab",), 0)))
    found = answer(prefers("a"), ASCII, words, max_seq_len=32, device=CPU, batch=2)
    assert found is not None and found.accuracy.value == 0.5 and found.accuracy_by_length is None


def test_longer_choices_are_compared_by_character() -> None:
    file = QuestionFile("t", "choices", (Question("x", ("bb", "aaaaaaaaaaaaaaaaa"), 1),))
    found = answer(prefers("a"), ASCII, file, max_seq_len=32, device=CPU, batch=2)
    assert found is not None and found.accuracy_by_length is not None
    assert (found.accuracy.value, found.accuracy_by_length.value) == (0.0, 1.0)


def test_intervals() -> None:
    losses = [2.0, 3.0, 2.5, 4.0]
    found = ratio([64 * x for x in losses], [64] * 4)
    half = 1.959964 * statistics.stdev(losses) / 2
    assert found == pytest.approx((2.875, 2.875 - half, 2.875 + half))
    assert ratio([3.0, 1.0], [1, 3]).value == 1.0
    assert ratio([6.0], [2]) == (3.0, -math.inf, math.inf)
    assert share(8, 10) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-5)  # Wilson 1927
    assert share(0, 5).low == 0.0 and share(5, 5).high == 1.0


# ---- questions ---------------------------------------------------------------------------------

HELLASWAG = {
    "activity_label": "Cooking",
    "ctx_a": "A man [title] cooks.",
    "ctx_b": "then he",
    "endings": ["eats  it.", "[step] leaves."],
    "label": "1",
}
ARC = {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"}
ARC_1 = {
    "question": {
        "stem": "Why?",
        "choices": [{"text": "so", "label": "1"}, {"text": "no", "label": "2"}],
    },
    "answerKey": "1",
}
READ = {
    "HellaSwag": (
        HELLASWAG,
        Question("Cooking: A man.  cooks. Then he", (" eats it.", "  leaves."), 1),
    ),
    "ARC": (ARC, Question("Question: Why?\nAnswer:", (" so", " no"), 1)),
    "ARC, earlier": (ARC_1, Question("Question: Why?\nAnswer:", (" so", " no"), 0)),
    "LAMBADA": ({"text": "one two three\n"}, Question("one two", (" three",), 0)),
    "choices": ({"context": "a", "choices": ["b", "c"], "answer": 1}, Question("a", ("b", "c"), 1)),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_formats(tmp_path: Path, name: str, suffix: str) -> None:
    record, question = READ[name]
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record] * 3), path)
    else:
        lines = [json.dumps(record)] * 3
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    found = read_questions(path, limit=2)
    assert found.name == "mine" and found.format == name.partition(",")[0]
    assert len(found.questions) == 2
    got = found.questions[0]
    assert (got.choices, got.answer) == (question.choices, question.answer)
    assert got.context.split() == question.context.split()


def test_other_line_ends_within_a_string(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    text = "one\u2028two\u0085three\x0bfour five"
    line = json.dumps({"text": text}, ensure_ascii=False).replace("\\u000b", "\x0b")
    path.write_text(line.replace("\x0b", " ") + "\r\n" + line.replace("\x0b", " "))
    assert len(read_questions(path).questions) == 2


WRONG = {
    "": "has no question",
    "[]": "has no question",
    "{": "line 1: ",
    "3": "question 1: no JSON object",
    '{"a": 1}': "question 1: has the keys a: none of HellaSwag",
    '{"choices": ["a", "b"], "answer": 1}': "as choices: has no key 'context'",
    '{"context": "", "choices": ["a", "b"], "answer": 2}': "its answer is 2, of 2 choices",
    '{"context": "", "choices": ["a"], "answer": 0}': "at least two texts are needed",
    '{"context": "", "choices": ["a", 5], "answer": 0}': "at least two texts are needed",
    '{"text": "word"}': "has no last word after others",
    '{"context": 5, "choices": ["a", "b"], "answer": 0}': "its context is 5: a text is needed",
    '{"context": "", "choices": "ab", "answer": 0}': "at least two texts are needed",
    '{"context": "", "choices": ["a", "b"], "answer": 0.9}': "its answer is 0.9, of 2 choices",
    '{"context": "", "choices": ["a", "b"], "answer": 1e400}': "its answer is inf, of 2 choices",
    "[" * 100_000: "recursion",
    '{"a":' * 100_000: "line 1: ",
    json.dumps(ARC | {"answerKey": "C"}): "as ARC: ",
    json.dumps(ARC) + '\n{"text": "a b"}': "question 2: is in the format of LAMBADA, those before",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_question(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_questions(path)
    assert str(path) in str(error.value) and WRONG[text] in str(error.value)
    assert "\n" not in str(error.value)


# ---- Python ------------------------------------------------------------------------------------

PYTHON = {
    "import os\nx = 1\n": True,
    "import os\nx = (1,": True,  # ends within a statement
    "import os\ndef f(a):\n    if a:\n        return [1, 2": True,
    "import os\ntry:\n    x = 1\n": True,
    'import os\n"""a text that does not en': True,
    "import os\nclass A:\n    def f(self": True,
    "def f(": False,  # no whole statement
    "import os\nx = = 1\ny = 2\n": False,
    "import os\nif x\n    y\n": False,
    "import os\n  x = 1\n": False,
    "the quick brown\n": False,
    "": False,
    "x = 1\n\x00\ny": False,
}


@pytest.mark.parametrize("text", PYTHON)
def test_what_parses(text: str) -> None:
    assert parses(text) == PYTHON[text]
