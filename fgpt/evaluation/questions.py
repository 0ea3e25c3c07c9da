"""Questions with given answers, from local files in the formats of the common benchmarks.

    HellaSwag   {"activity_label": , "ctx_a": , "ctx_b": , "endings": [...], "label": 2}
    ARC         {"question": , "choices": {"text": [...], "label": ["A", ...]}, "answerKey": "B"};
                earlier {"question": {"stem": , "choices": [{"text": , "label": }, ...]}, ...}
    LAMBADA     {"text": }: the last word is the answer, and the model must find it by itself
    any other   {"context": , "choices": [...], "answer": 0}

A file is JSON lines, a JSON list, or Parquet. Prompts are those of lm-evaluation-harness.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.errors import DataError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A context and what may follow it."""

    context: str
    choices: tuple[str, ...]
    """Each with the space before it; of a question without choices, the answer alone."""
    answer: int
    """Index of the right one."""


@dataclass(frozen=True)
class QuestionFile:
    """The questions of one file."""

    name: str
    format: str
    questions: tuple[Question, ...]

    @property
    def has_choices(self) -> bool:
        """Whether the model chooses; else it must produce the answer greedily."""
        return self.format != "LAMBADA"


def read_questions(path: Path, limit: int | None = None) -> QuestionFile:
    """Read the first `limit` questions of a file, or all. Raises DataError naming the record."""
    questions: list[Question] = []
    found = ""
    for number, record in enumerate(_records(path), 1):
        where = f"{path}: question {number}"
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: no JSON object")
        name, parse = _format_of(record, where)
        if found and name != found:
            raise DataError(f"{where}: is in the format of {name}, those before of {found}")
        found = name
        try:
            question = parse(record)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            text = f"has no key {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}: as {name}: {text}") from error
        questions.append(question)
        if limit is not None and len(questions) >= limit:
            break
    if not questions:
        raise DataError(f"{path}: has no question")
    return QuestionFile(path.stem, found, tuple(questions))


def _records(path: Path) -> Iterator[Any]:
    """The records of a file in their order. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; name one of questions (JSON lines, JSON, Parquet)")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        if text.lstrip()[:1] == "[":
            yield from json.loads(text)
            return
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):  # a string may have other line ends
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number}: {error}") from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: {error}") from error


# ---- formats -----------------------------------------------------------------------------------


def _format_of(record: Record, where: str) -> tuple[str, Callable[[Record], Question]]:
    if "endings" in record:
        return "HellaSwag", _hellaswag
    if "answerKey" in record:
        return "ARC", _arc
    if "choices" in record:
        return "choices", _choices
    if "text" in record:
        return "LAMBADA", _lambada
    raise DataError(
        f"{where}: has the keys {', '.join(map(str, record))}: none of HellaSwag (endings), ARC"
        " (answerKey), LAMBADA (text), or context, choices, answer"
    )


def _checked(context: Any, choices: Any, answer: Any) -> Question:
    """`answer`: an integer, also as text."""
    if not isinstance(context, str):
        raise ValueError(f"its context is {context!r}: a text is needed")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise ValueError(f"its choices are {choices!r}: at least two texts are needed")
    number = int(answer) if isinstance(answer, str) and answer.isdecimal() else answer
    if type(number) is not int or not 0 <= number < len(choices):
        raise ValueError(f"its answer is {answer!r}, of {len(choices)} choices")
    return Question(context, tuple(choices), number)


def _hellaswag(record: Record) -> Question:
    if "ctx_a" in record:
        context = f"{record['ctx_a']} {str(record['ctx_b']).capitalize()}"
    else:
        context = record["ctx"]
    label = record.get("activity_label")
    context = _without_marks(f"{label}: {context}" if label else context)
    return _checked(context, [f" {_without_marks(e)}" for e in record["endings"]], record["label"])


def _without_marks(text: str) -> str:
    """Without what the WikiHow texts are marked with: [title], [step], [substeps]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(record: Record) -> Question:
    question = record["question"]
    choices = question["choices"] if isinstance(question, Mapping) else record["choices"]
    question = question["stem"] if isinstance(question, Mapping) else question
    if isinstance(choices, Mapping):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    if len(texts) != len(labels) or record["answerKey"] not in labels:
        raise ValueError(f"its answerKey is {record['answerKey']!r}, its labels {list(labels)!r}")
    answer = list(labels).index(record["answerKey"])
    return _checked(f"Question: {question}\nAnswer:", [f" {text}" for text in texts], answer)


def _choices(record: Record) -> Question:
    return _checked(record["context"], record["choices"], record["answer"])


def _lambada(record: Record) -> Question:
    context, space, word = record["text"].strip().rpartition(" ")
    if not space:
        raise ValueError(f"its text {record['text']!r} has no last word after others")
    return Question(context, (space + word,), 0)
