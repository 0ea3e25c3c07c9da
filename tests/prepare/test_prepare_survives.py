"""After kills, full disks, interrupts and with two writers, the data set is complete or absent."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fgpt.data.recipe import Recipe
from fgpt.data.token_dataset import TokenDataset
from fgpt.errors import DataError
from fgpt.prepare import pipeline
from fgpt.prepare.pipeline import prepare
from fgpt.prepare.workspace import dataset_lock
from tests.prepare.corpora import CHILD, run_python, small_recipe, tree, write_corpus


def test_killed_at_any_file_operation(prepared: TokenDataset, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    total = int(run_python(CHILD, corpus, out, 0, "no").stdout)
    assert total > 12
    expected = tree(prepared.path)
    for k in range(1, total + 1):
        target = tmp_path / str(k) / "out"
        done = run_python(CHILD, corpus, target, k, "no")
        assert done.returncode == -signal.SIGKILL
        assert not target.exists() or tree(target) == expected
        prepare(small_recipe(corpus), target, progress=False)
        assert tree(target) == expected
        assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_killed_while_replacing(prepared: TokenDataset, corpus: Path, tmp_path: Path) -> None:
    """At every moment the old or the new data set is there, and the next run finds it."""
    other = write_corpus(tmp_path / "texts", documents=10)
    expected = tree(prepared.path)
    for back in range(1, 9):
        target = tmp_path / str(back) / "out"
        prepare(small_recipe(other), target, progress=False)
        before = tree(target)
        if back == 1:
            total = int(run_python(CHILD, corpus, target, 0, "force").stdout)
            assert tree(target) == expected
            continue
        done = run_python(CHILD, corpus, target, total - back, "force")
        assert done.returncode == -signal.SIGKILL
        old = target.with_name(f".{target.name}.fgpt-old")
        assert tree(target if target.exists() else old) in (before, expected)
        prepare(small_recipe(corpus), target, progress=False, force=True)
        assert tree(target) == expected
        assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_killed_at_random_moments(prepared: TokenDataset, corpus: Path, tmp_path: Path) -> None:
    code = (
        "import threading, time, os, signal, sys\n"
        "delay = float(sys.argv.pop())\n"
        "import fgpt.prepare.pipeline\n"
        "die = lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL))\n"
        "threading.Thread(target=die, daemon=True).start()\n" + CHILD
    )
    for i, delay in enumerate(np.random.default_rng(5).uniform(0, 0.15, 5).tolist()):
        target = tmp_path / f"r{i}"
        run_python(code, corpus, target, 0, "no", delay)
        assert not target.exists() or tree(target) == tree(prepared.path), delay
        prepare(small_recipe(corpus), target, progress=False)
        assert tree(target) == tree(prepared.path), delay


def test_disk_full(prepared: TokenDataset, corpus: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    done = run_python(limit + CHILD, corpus, tmp_path / "out", 0, "no")
    assert done.returncode == 1
    assert done.stderr.startswith("DataError: ")
    assert "out: cannot be written (File too large)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.fgpt-parts"]
    assert not list(tmp_path.glob(".out.fgpt-parts/*.tmp"))
    prepare(small_recipe(corpus), tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == tree(prepared.path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_in_the_corpus_leaves_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "texts", documents=5)
    (tmp_path / "texts/zz.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="zz.txt: byte 3: not UTF-8"):
        prepare(small_recipe(tmp_path / "texts"), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
    card = prepare(
        small_recipe(tmp_path / "texts", errors="skip"), tmp_path / "out", progress=False
    )
    assert card.source.flawed == 1
    assert card.source.flaws[0].startswith("zz.txt: byte 3")


def test_an_interrupt_leaves_finished_parts_and_nothing_else(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "make_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(small_recipe(corpus), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [".out.fgpt-parts"]


def test_corpus_that_changes_underneath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write_corpus(tmp_path / "texts", documents=5)
    choose_encoder = pipeline.choose_encoder

    def late(*args: Any) -> Any:
        (texts / "000.txt").write_text("something else")
        return choose_encoder(*args)

    monkeypatch.setattr(pipeline, "choose_encoder", late)
    with pytest.raises(DataError, match="000.txt: changed while the corpus was read"):
        prepare(small_recipe(texts), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_second_writer_is_refused_with_the_pid_or_waits(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with dataset_lock(out, wait=False):
        with pytest.raises(
            DataError, match=f"process {os.getpid()} on .* is writing this data set"
        ):
            prepare(recipe, out, progress=False)
    entered = threading.Event()

    def hold() -> None:
        with dataset_lock(out, wait=False):
            entered.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    t0 = time.perf_counter()
    prepare(recipe, out, progress=False, wait=True)
    assert time.perf_counter() - t0 > 0.3
    thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_at_once(prepared: TokenDataset, corpus: Path, tmp_path: Path) -> None:
    results: list[tuple[int, str]] = []

    def run() -> None:
        done = run_python(CHILD, corpus, tmp_path / "out", 0, "no")
        results.append((done.returncode, done.stderr))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(code == 0 for code, _ in results)
    for code, message in results:
        assert code == 0 or "is writing this data set" in message
    assert tree(tmp_path / "out") == tree(prepared.path)
