"""What an interrupted prepare_job leaves: parts that the next run uses if they are still right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fgpt.data.recipe import TokenizerSpec
from fgpt.data.token_dataset import TokenDataset
from fgpt.errors import DataError
from fgpt.prepare import cache_key, prepare_job, verified_encoder, workers
from fgpt.prepare.parts import Job, Part
from fgpt.prepare.pipeline import prepare
from tests.prepare.corpora import (
    prepared_again,
    small_recipe,
    tree,
    write_corpus,
)

pytestmark = pytest.mark.usefixtures("many_tasks")


class _Stopped(Exception):
    pass


def stopping_after(count: int) -> Callable[..., Iterator[Part]]:
    """`make_parts` that is interrupted when `count` parts are finished."""

    def make_parts(job: Job, tasks: Any, n_workers: int, progress: Any) -> Iterator[Part]:
        for number, part in enumerate(workers.make_parts(job, tasks, n_workers, progress)):
            if number == count:
                raise _Stopped
            yield part

    return make_parts


@contextmanager
def interrupted_after(count: int) -> Iterator[None]:
    """Run what is inside until `count` parts are finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_job, "make_parts", stopping_after(count))
        with pytest.raises(_Stopped):
            yield


@pytest.mark.parametrize("count", [0, 2])
def test_finished_parts_are_kept_and_not_made_again(
    prepared: TokenDataset,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    with interrupted_after(5):
        prepared_again(corpus, tmp_path / "out", count)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".out.fgpt-parts/0*.json")}
    assert len(kept) >= 5
    damaged = sorted(tmp_path.glob(".out.fgpt-parts/*.ids"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"xx")
    made: list[int] = []

    def watched(job: Job, tasks: Any, *args: Any) -> Iterator[Part]:
        def seen() -> Iterator[Any]:
            for task in tasks:
                made.append(task.number)
                yield task

        return workers.make_parts(job, seen(), *args)

    monkeypatch.setattr(prepare_job, "make_parts", watched)
    prepared_again(corpus, tmp_path / "out", count)
    assert tree(tmp_path / "out") == tree(prepared.path)
    again = {int(name[:6]) for name in kept} & set(made)
    assert again == {int(damaged.stem)}


@pytest.mark.parametrize("change", ["seed", "sources", "tokenizer"])
def test_parts_of_other_settings_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    texts = write_corpus(tmp_path / "texts", documents=40)
    with interrupted_after(3):
        prepared_again(texts, tmp_path / "out", 0)
    changes: dict[str, Any] = {}
    if change == "seed":
        changes = {"seed": 5}
    elif change == "tokenizer":
        changes = {"tokenizer": TokenizerSpec(vocab_size=300)}
    else:
        (texts / "000.txt").write_text("something else")
    prepared_again(texts, tmp_path / "out", 0, **changes)
    prepared_again(texts, tmp_path / "fresh", 0, **changes)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_an_encoder_at_fault_stays_out_after_an_interruption(
    prepared: TokenDataset, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_mismatch(self: verified_encoder.VerifiedEncoder, texts: list[bytes]) -> str | None:
        return "gigatoken gave other ids" if self._is_fast else None

    learned: list[int] = []
    original = prepare_job.learn_tokenizer
    monkeypatch.setattr(
        prepare_job, "learn_tokenizer", lambda *args: learned.append(1) or original(*args)
    )
    with monkeypatch.context() as patch:
        patch.setattr(verified_encoder.VerifiedEncoder, "find_mismatch", find_mismatch)

        def interrupted(self: Any, *args: Any) -> Any:
            raise _Stopped

        patch.setattr(prepare_job.PrepareJob, "_checked", interrupted)
        with pytest.raises(_Stopped):
            prepared_again(corpus, tmp_path / "out", 0)
    fast: list[bool] = []
    begin = verified_encoder.VerifiedEncoder.__init__

    def seen(self: verified_encoder.VerifiedEncoder, spec: Any) -> None:
        fast.append(spec.is_fast)
        begin(self, spec)

    monkeypatch.setattr(verified_encoder.VerifiedEncoder, "__init__", seen)
    (sorted(tmp_path.glob(".out.fgpt-parts/0*.ids"))[0]).unlink()
    prepared_again(corpus, tmp_path / "out", 0)
    assert fast == [False] and len(learned) == 1
    assert tree(tmp_path / "out") == tree(prepared.path)


def test_parts_of_other_software_are_not_used(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_after(3):
        prepared_again(corpus, tmp_path / "out", 0)
    monkeypatch.setattr(cache_key, "_version", lambda name: "another")
    made: list[Part] = []

    def watched(*args: Any) -> Iterator[Part]:
        for part in workers.make_parts(*args):
            made.append(part)
            yield part

    monkeypatch.setattr(prepare_job, "make_parts", watched)
    prepared_again(corpus, tmp_path / "out", 0)
    assert len(made) >= 12


def test_a_stream_that_changed_is_read_again(
    prepared: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fgpt.prepare.sources import hub
    from fgpt.prepare.sources.corpus import ReadOptions

    monkeypatch.setattr(hub, "TASK_BYTES", 300)
    rows = [{"text": f"text number {i} " * 10} for i in range(20)]
    newer = [*rows[:5], {"text": "something else " * 10}, *rows[6:]]
    recipe = small_recipe(tmp_path, tokenizer=TokenizerSpec(path=str(prepared.path)))

    def prepare_rows(found: list[dict[str, str]], out: Path) -> None:
        corpus = hub.Stream(found, "remote", ReadOptions(), "remote")
        monkeypatch.setattr(prepare_job, "open_corpus", lambda *_: corpus)
        prepare(recipe, out, progress=False, workers=0)

    prepare_rows(newer, tmp_path / "fresh")
    with interrupted_after(4):
        prepare_rows(rows, tmp_path / "out")
    prepare_rows(newer, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_mistyped_tokenizer_costs_no_parts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_after(3):
        prepared_again(corpus, tmp_path / "out", 0)
    before = tree(tmp_path / ".out.fgpt-parts")
    with pytest.raises(DataError, match="nowhere"):
        prepared_again(corpus, tmp_path / "out", 0, tokenizer=TokenizerSpec(path="nowhere"))
    assert tree(tmp_path / ".out.fgpt-parts") == before
