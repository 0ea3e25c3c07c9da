"""What a run decodes, samples and answers: the same at every layout."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all, zero

SAMPLE = (
    "sample.tokens=12",
    "sample.every=4",
    "sample.temperature=0",
    "sample.prompt=def f(",
    "eval.every=3",
)
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "zero3_dp2": (zero(3), ()),
    "zero3_tp2": (zero(3), ("--tp=2",)),
    "zero3_cp2": (zero(3), ("--cp=2",)),
    "zero2_dp2": (zero(2), ()),
    "zero1_tp2": (zero(1), ("--tp=2",)),
    "sequence": (zero(1), ("--tp=2", "--set=parallel.sequence=true")),
    "pp2": (zero(1), ("--pp=2",)),
}


@pytest.mark.timeout(150)
def test_samples_and_answers_are_the_same_at_every_layout(tiny: Tiny) -> None:
    suite = tiny.folder / "mine.jsonl"
    questions = [
        {"context": "def f(", "choices": [word, " " * len(word), "return x"], "answer": i % 3}
        for i, word in enumerate(("self", "a", "x, y", "import", "None", "class A"))
    ]
    suite.write_text("\n".join(map(json.dumps, questions)))

    def flags(name: str, ds: dict[str, Any], *more: str) -> list[str]:
        micro = 2 if "--tp=2" in more or "--cp=2" in more or "--pp=2" in more else 1
        micro = 2 if name == "plain" else micro
        file = tiny.ds(name, train_micro_batch_size_per_gpu=micro, **ds)
        sets = [
            f"--set={value}" for value in (*SAMPLE, "checkpoint.every=0", f"eval.suites={suite}")
        ]
        return tiny.flags(name, *sets, *more, ds=file)

    runs = [flags(name, ds, *more) for name, (ds, more) in LAYOUTS.items()]
    for outcomes in run_ranks(train_all, 2, runs, timeout_s=140):
        assert [(o.code, o.error) for o in outcomes] == [(0, "")] * len(runs)
    plain = flags("plain", zero(1), "--set=train.engine=plain")
    [(outcome,)] = run_ranks(train_all, 1, [plain])
    assert (outcome.code, outcome.error) == (0, "")
    wanted = (tiny.path("plain") / "sample.txt").read_text()
    assert wanted.startswith("def f(") and len(wanted) > len("def f(") + 4
    for name in LAYOUTS:
        assert (tiny.path(name) / "sample.txt").read_text() == wanted, name
        assert recorded(tiny, name, "samples.jsonl") == recorded(tiny, "plain", "samples.jsonl")
        answers = recorded(tiny, name, "metrics.jsonl", "suite")
        for mine, plains in zip(
            answers, recorded(tiny, "plain", "metrics.jsonl", "suite"), strict=True
        ):
            assert (mine["step"], mine["accuracy"]) == (plains["step"], plains["accuracy"]), name
            for key in ("accuracy_by_length", "nats_per_answer"):
                assert mine[key] == pytest.approx(plains[key], rel=1e-4), name
    assert [r["step"] for r in recorded(tiny, "plain", "samples.jsonl")] == [0, 4, 6]
    assert [r["step"] for r in recorded(tiny, "plain", "metrics.jsonl", "suite")] == [0, 3, 6]
    assert wanted.endswith(recorded(tiny, "plain", "samples.jsonl")[-1]["text"])


def recorded(tiny: Tiny, run: str, file: str, key: str = "step") -> list[dict[str, Any]]:
    """The records of a file that have this key."""
    lines = (tiny.path(run) / file).read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def test_suites_are_read_before_anything_is_changed(tiny: Tiny) -> None:
    (tiny.folder / "a").mkdir()
    for name in ("a/val.jsonl", "val.jsonl"):
        (tiny.folder / name).write_text('{"text": "def f"}')
    both = f"--set=eval.suites={tiny.folder}/a/val.jsonl,{tiny.folder}/val.jsonl"
    runs = [
        tiny.flags("run", both, "--steps=1"),
        tiny.flags("run", "--set=eval.suites=typo.jsonl"),
    ]
    good, typo = run_ranks(train_all, 1, runs)[0]
    assert good.code == 0 and typo.code == 2 and "typo.jsonl: no such file" in typo.error
    assert not tiny.path("run.1").exists()  # the earlier run stays where it is
    names = {record["suite"] for record in recorded(tiny, "run", "metrics.jsonl", "suite")}
    assert names == {"a/val", f"{tiny.folder.name}/val"}
    assert [r["tokens"] for r in recorded(tiny, "run", "metrics.jsonl", "loss")] == [64]


def test_answers_that_a_signal_prevented_are_given_after_the_resume(tiny: Tiny) -> None:
    suite = tiny.folder / "mine.jsonl"
    suite.write_text('{"text": "def f"}')
    more = (f"--set=eval.suites={suite}", "--set=eval.every=2", "--set=sample.every=2")
    first = tiny.flags("run", *more, "--set=sample.tokens=3", "--steps=4")
    assert run_ranks(train_all, 1, [first])[0][0].code == 0
    metrics = tiny.path("run") / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"suite"' not in line]
    metrics.write_text("".join(f"{line}\n" for line in kept))
    again = tiny.flags("run", *more, "--set=sample.tokens=3", "--steps=6", "--resume=auto")
    assert run_ranks(train_all, 1, [again])[0][0].code == 0
    steps = [r["step"] for r in recorded(tiny, "run", "metrics.jsonl", "suite")]
    assert steps == [4, 6]
    assert [r["step"] for r in recorded(tiny, "run", "samples.jsonl")] == [0, 2, 4, 6]
