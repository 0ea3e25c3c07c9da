"""Worker processes: the same bytes for any number of them, and what their deaths leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fgpt.data.recipe import TokenizerSpec
from fgpt.data.token_dataset import TokenDataset
from fgpt.errors import DataError
from fgpt.prepare import verified_encoder, workers
from fgpt.prepare.pipeline import prepare
from fgpt.prepare.sources.corpus import Interrupted
from fgpt.tokenizer.encoders import Encoder
from tests.prepare.corpora import (
    CHILD,
    REPOSITORY,
    prepared_again,
    run_python,
    small_recipe,
    tree,
    write_corpus,
)

N_TASKS = 12


pytestmark = pytest.mark.usefixtures("many_tasks")


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_same_bytes_for_any_number_of_workers(
    prepared: TokenDataset, corpus: Path, tmp_path: Path, count: int
) -> None:
    prepared_again(corpus, tmp_path / "out", count)
    assert tree(tmp_path / "out") == tree(prepared.path)


def test_a_small_corpus_needs_none() -> None:
    assert workers.worker_count(None, 1000) == 0
    assert workers.worker_count(None, 10**9) == len(os.sched_getaffinity(0))
    assert workers.worker_count(None, None) == len(os.sched_getaffinity(0))
    assert workers.worker_count(3, 1000) == 3


def test_a_flaw_found_by_a_worker(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "texts")
    (texts / "040.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="texts/040.txt: byte 3: not UTF-8"):
        tokenizer = TokenizerSpec(path=str(_tokenizer(tmp_path)))
        prepared_again(texts, tmp_path / "out", tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "texts", "tok"]


def _tokenizer(tmp_path: Path) -> Path:
    prepare(small_recipe(write_corpus(tmp_path / "other", 5)), tmp_path / "tok", progress=False)
    return tmp_path / "tok"


def test_a_disk_that_is_full_for_the_workers(corpus: Path, tmp_path: Path) -> None:
    limit = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "import fgpt.prepare.workers as w; w.IN_PROCESS_BYTES = 0\n"
    )
    done = run_python(limit + CHILD, corpus, tmp_path / "out", 0, "no")
    assert "out: cannot be written (File too large); finished parts are kept" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_worker_that_is_killed(
    prepared: TokenDataset, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give = workers._Worker.give

    def fatal(self: Any, task: Any) -> None:
        give(self, task)
        if task.number == 6:
            self.process.kill()

    # it may have answered before it died: then it is missed at a later task
    missed = r"signal 9 \(out of memory\?.* in task [6-9]; run the"
    with monkeypatch.context() as patch:
        patch.setattr(workers._Worker, "give", fatal)
        with pytest.raises(Interrupted, match=missed):
            prepared_again(corpus, tmp_path / "out")
    assert list(tmp_path.glob(".out.fgpt-parts/*.json"))
    prepared_again(corpus, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(prepared.path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_workers_end_with_a_parent_that_is_killed(corpus: Path, tmp_path: Path) -> None:
    slow = (
        "import time, fgpt.prepare.workers as w, fgpt.prepare.pipeline as p\n"
        "w.IN_PROCESS_BYTES = 0\n"
        "import fgpt.prepare.sources.local as l; l.TASK_BYTES = 6000\n"
        "original = w._Worker.answer\n"
        "def answer(self):\n"
        "    print(self.process.pid, flush=True); time.sleep(60)\n"
        "w._Worker.answer = answer\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow + CHILD, corpus, tmp_path / "out", "0", "no"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_a_fast_encoder_with_other_ids_is_noticed_and_replaced(
    prepared: TokenDataset,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As if gigatoken had passed every test before the fifth task."""
    calls = 0

    def find_mismatch(self: verified_encoder.VerifiedEncoder, texts: list[bytes]) -> str | None:
        nonlocal calls
        calls += 1
        return "gigatoken gave other ids" if self._is_fast and calls == 5 else None

    monkeypatch.setattr(verified_encoder.VerifiedEncoder, "find_mismatch", find_mismatch)
    with pytest.raises(DataError, match="the fast encoder cannot be used: gigatoken gave other"):
        prepare(small_recipe(corpus), tmp_path / "out", progress=False, workers=0, encoder="fast")
    calls = 0
    prepare(small_recipe(corpus), tmp_path / "out", workers=0)
    told = capsys.readouterr().err
    assert "gigatoken gave other ids; beginning again, the exact way" in told
    assert "of it in tokenizers" in told
    assert tree(tmp_path / "out") == tree(prepared.path)


def test_every_task_is_compared_with_the_library(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []
    original = Encoder.find_mismatch

    def find_mismatch(self: Encoder, texts: list[bytes]) -> str | None:
        compared.extend(texts)
        return original(self, texts)

    monkeypatch.setattr(Encoder, "find_mismatch", find_mismatch)
    prepare(small_recipe(corpus), tmp_path / "out", progress=False, workers=0)
    whole = {path.read_bytes() for path in corpus.iterdir()}
    spots = {text for text in compared if text not in whole and len(text) > 450}
    from_corpus = [spot for spot in spots if any(spot in text for text in whole)]
    assert len(from_corpus) >= N_TASKS * verified_encoder.EXCERPTS // 2


def test_spots_are_all_over_a_batch() -> None:
    texts = [bytes([65 + i]) * 5000 for i in range(8)]
    assert [spot[:1] for spot in verified_encoder.excerpts(texts)] == [b"A", b"C", b"E", b"G"]
    assert all(
        len(spot) == verified_encoder.EXCERPT_BYTES for spot in verified_encoder.excerpts(texts)
    )
    one = "".join(map(chr, range(0x4E00, 0x5E00)))
    found = [spot.decode() for spot in verified_encoder.excerpts([one.encode()])]
    assert [one.index(spot) for spot in found] == sorted(map(one.index, found))
    assert found[0] == one[:170] and found[-1] == one[-170:]
    assert [*verified_encoder.excerpts([b"short", b""])] == [b"short", b"short", b"", b""]


def test_workers_that_made_ready_for_nothing(
    prepared: TokenDataset, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gigatoken, which the workers were told to expect, is found to differ."""
    monkeypatch.setattr(
        "fgpt.tokenizer.encoders.find_mismatch", lambda *_: "gigatoken gave other ids"
    )
    encoders: list[bool] = []
    employ = workers._Worker.employ
    monkeypatch.setattr(
        workers._Worker,
        "employ",
        lambda self, job: (encoders.append(job.encoder.is_fast), employ(self, job)),
    )
    prepared_again(corpus, tmp_path / "out", 2)
    assert encoders == [True, False, False]  # one is started beforehand: the corpus is small
    assert tree(tmp_path / "out") == tree(prepared.path)


@pytest.mark.parametrize("encoder", ["exact", "fast"])
def test_both_encoders_give_the_same_data_set(
    prepared: TokenDataset, corpus: Path, tmp_path: Path, encoder: Any
) -> None:
    prepare(small_recipe(corpus), tmp_path / "out", progress=False, encoder=encoder)
    assert tree(tmp_path / "out") == tree(prepared.path)


def test_a_corpus_in_the_working_directory_is_not_run(
    prepared: TokenDataset, tmp_path: Path
) -> None:
    """Workers are started in a folder of Python sources named like libraries."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("xxhash", "numpy", "tokenizers", "json", "fgpt"):
        (texts / f"{name}.py").write_text(f"raise SystemExit({name!r})\n")
    code = (
        "import os, sys; sys.path[:] = filter(None, sys.path)\n"
        "from fgpt.prepare.pipeline import prepare\n"
        "from fgpt.prepare.sources.open_source import SourceSpec\n"
        "from fgpt.data.recipe import Recipe, TokenizerSpec\n"
        "recipe = Recipe('x', SourceSpec('local', '.'), TokenizerSpec(path=sys.argv[1]))\n"
        "os.chdir(sys.argv[2])\n"
        "print(prepare(recipe, sys.argv[3], workers=1).source.documents)\n"
    )
    done = run_python(code, prepared.path, texts, tmp_path / "out")
    assert done.stdout == "5\n", done.stderr


def test_folders_beside_the_data_set_are_left_alone(corpus: Path, tmp_path: Path) -> None:
    names = ("out.old", "out.tmp", "out.parts")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    prepared_again(corpus, tmp_path / "out", 0)
    prepared_again(corpus, tmp_path / "out", 0, seed=1234)
    assert all((tmp_path / name / "thesis.txt").exists() for name in names)


def test_a_data_set_on_another_disk_is_replaced_there(
    prepared: TokenDataset, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):
        prepare(small_recipe(corpus), tmp_path / "out", progress=False, force=True)
        assert (tmp_path / "out").is_symlink()
        assert tree(tmp_path / "disk" / "real") == tree(prepared.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
