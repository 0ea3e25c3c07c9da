"""Every path argument of every verb x every bad path: one line, exit code 2, nothing raw."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest

from fgpt.cli import main
from fgpt.cli import train as training
from fgpt.data.token_dataset import open_token_dataset
from fgpt.tokenizer.load import COPY, save_copy
from tests.convert.models import save_random, small_config
from tests.prepare.corpora import prepared_again, tree, write_corpus
from tests.ranks import ROOT

pytestmark = pytest.mark.timeout(30)
NOBODY = 65534
BAD = "{bad}"
PREPARE = ("prepare", "--input", "{texts}", "--vocab_size", "300")
IMPORT = ("data", "import", "--train", "{data}/train", "--tokenizer", "{data}", "--out", "{new}")
CHECK = ("check", "--device", "cpu", "--ds_config", "{json}")
TRAIN = ("train.py", "--ds_config", "{json}")

RESUME = ("resume-check", "--set", "data.seq_len=32", "--ds_config", "{json}")

READ: tuple[tuple[str, ...], ...] = (
    ("prepare", "--input", BAD, "--out", "{new}"),
    ("prepare", "--input", "{texts}", BAD, "--out", "{new}"),
    ("prepare", "--recipe", BAD, "--out", "{new}"),
    ("prepare", "--dataset", BAD, "--out", "{new}"),
    ("prepare", "--input", "{texts}", "--tokenizer", BAD, "--out", "{new}"),
    ("tokenizer", "train", "--input", BAD, "--out", "{new}"),
    ("tokenizer", "encode", "text", "--tokenizer", BAD),
    ("tokenizer", "decode", "1", "--tokenizer", BAD),
    ("tokenizer", "inspect", "--tokenizer", BAD),
    ("tokenizer", "report", "--input", "{texts}", "--tokenizer", BAD),
    ("tokenizer", "report", "--input", BAD, "--tokenizer", "{data}"),
    ("data", "inspect", BAD),
    ("data", "inspect", BAD, "--json"),
    ("data", "inspect", "{data}", "--tokenizer", BAD),
    ("data", "verify", "{data}", BAD),
    ("data", "merge", "{data}", BAD, "--out", "{new}"),
    ("data", "import", "--train", BAD, "--tokenizer", "{data}", "--out", "{new}"),
    (*IMPORT, "--valid", BAD),
    (*IMPORT, "--test", BAD),
    ("data", "import", "--train", "{data}/train", "--tokenizer", BAD, "--out", "{new}"),
    ("check", "--device", "cpu", "--ds_config", BAD),
    (*CHECK, "--run_file", BAD),
    ("train.py", "--ds_config", BAD),
    (*TRAIN, "--run_file", BAD),
    ("checkpoint", "inspect", BAD),
    ("checkpoint", "verify", BAD),
    ("checkpoint", "diff", BAD, BAD),
    ("checkpoint", "average", BAD, BAD, "--out", "{new}"),
    ("checkpoint", "upgrade", BAD),
    ("generate", BAD, "--prompt", "x"),
    ("generate", "{model}", "--prompt_file", BAD),
    ("generate", "{model}", "--prompt", "x", "--tokenizer", BAD),
    ("eval", BAD),
    ("eval", "{model}", "--data", BAD),
    ("eval", "{model}", "--suite", BAD),
    ("eval", "{model}", "--tokenizer", BAD),
    ("convert", BAD, "--to", "hf", "--out", "{new}"),
    ("convert", BAD, "--from", "hf", "--out", "{new}"),
    ("runs", BAD),
    (*CHECK, "--init_from", BAD),
    ("parity", "--ds_config", BAD),
    ("parity", "--run_file", BAD),
    ("doctor", "--ds_config", BAD),
    ("doctor", "--run_file", BAD),
    ("resume-check", "--ds_config", BAD),
    (*RESUME, "--run_file", BAD),
    (*RESUME, "--data", BAD),
    ("report", BAD, "--out", "{new}"),
    ("report", "{records}", "--out", "{new}", "--readme", BAD),
    ("bench", "multi", "--out", "{new}", "--hostfile", BAD),
    ("bench", "data", "--tokens", "0", "--out", "{new}", "--input", BAD),
    ("bench", "recipe", "--out", "{new}", "--data", BAD),
    ("bench", "data", "--tokens", "0", "--out", "{new}", "--tmp", BAD),
)
WRITE_FOLDER: tuple[tuple[str, ...], ...] = (
    (*PREPARE, "--out", BAD),
    ("tokenizer", "train", "--input", "{texts}", "--vocab_size", "300", "--out", BAD),
    ("data", "merge", "{data}", "{other}", "--out", BAD),
    (*IMPORT[:-1], BAD),
    ("report", "{records}", "--out", BAD),
    ("report", "{run}", "--out", BAD),
    ("convert", "{model}", "--to", "hf", "--out", BAD),
    ("bench", "single", "--out", "{new}", "--trace", BAD),
    (*RESUME, "--data", "{data}", "--keep", BAD),
)
WRITE_FILE: tuple[tuple[str, ...], ...] = (
    (*CHECK, "--fix", BAD),
    ("parity", "--out", BAD),
    ("bench", "single", "--out", BAD),
    ("bench", "data", "--tokens", "0", "--out", BAD),
    ("bench", "checkpoint", "--rows", "tiny", "--out", BAD),
    ("bench", "recipe", "--out", BAD),
)

READ_PATHS = {
    "missing": "missing",
    "below a missing folder": "missing/folder/file",
    "empty string": "",
    "NUL": "a\0b",
    "control characters": "a\x1b[31m\rb\u202ec",
    "undecodable": "a\udcffb",
    "long name": "x" * 300,
    "long path": "x/" * 3000,
    "empty file": "empty",
    "garbage": "garbage",
    "empty folder": "folder",
    "below a file": "garbage/file",
    "broken link": "broken",
    "loop of links": "loop",
    "unreadable file": "closed.txt",
    "unreadable folder": "closed",
    "below an unreadable folder": "closed/file.txt",
    "device": "/dev/null",
}
WRITE_PATHS = {
    "empty string": "",
    "NUL": "a\0b",
    "long name": "x" * 300,
    "long path": "x/" * 3000,
    "below a file": "garbage/x",
    "loop of links": "loop",
    "below a loop": "loop/x",
    "below an unreadable folder": "closed/x",
    "in a read-only folder": "readonly/x",
    "far below a read-only folder": "readonly/x/y/z",
    "kernel's": "/proc/none/x",
}


PROTECTED = ("closed", "readonly", "/proc")


@dataclass(frozen=True)
class Bench:
    """Good and bad files."""

    folder: Path
    names: dict[str, str]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    # not below pytest's own folder, which other users cannot enter
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_corpus(folder / "texts", documents=30)
        prepared_again(folder / "texts", folder / "data", workers=0)
        prepared_again(folder / "texts", folder / "other", workers=0, seed=5)
        (folder / "empty").touch()
        (folder / "garbage").write_bytes(bytes(range(256)) * 4)
        (folder / "folder").mkdir()
        (folder / "broken").symlink_to("nowhere")
        (folder / "loop").symlink_to("loop")
        (folder / "closed.txt").write_text("secret")
        (folder / "closed").mkdir()
        (folder / "closed" / "file.txt").write_text("secret")
        (folder / "readonly").mkdir()
        for closed, mode in (("closed.txt", 0), ("closed", 0), ("readonly", 0o555)):
            (folder / closed).chmod(mode)
        (folder / "work").mkdir()
        (folder / "work").chmod(0o777)
        records = next((ROOT / "fgpt" / "bench" / "results").glob("*.jsonl"))
        names = {"json": ROOT / "ds_configs" / "zero2.json", "records": records}
        names |= {name: folder / name for name in ("texts", "data", "other")}
        save_random(folder / "run", small_config())
        save_copy(open_token_dataset(folder / "data").tokenizer, folder / "run" / COPY)
        (folder / "run" / "metrics.jsonl").write_text('{"step": 0, "valid_loss": 4.5}\n')
        names |= {"run": folder / "run", "model": folder / "run"}
        names["new"] = folder / "work" / "new"
        yield Bench(folder, {key: str(path) for key, path in names.items()})
        for closed in ("closed.txt", "closed", "readonly"):
            (folder / closed).chmod(0o755)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run as a user whom file permissions stop; root ignores them."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(autouse=True)
def surroundings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.folder / "work")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(bench.folder / "work" / "cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(training, "protect_console", lambda: None)
    monkeypatch.setattr(training, "exit_with_parent", lambda environ: None)


def run(bench: Bench, argv: Sequence[str], path: str) -> object:
    """Run a verb; returns its exit code."""
    verb, *rest = [path if text == BAD else text.format(**bench.names) for text in argv]
    try:
        return training.main(rest) if verb == "train.py" else main([verb, *rest])
    except SystemExit as stop:
        return stop.code


def check(
    bench: Bench, argv: Sequence[str], bad: str, error: Callable[[], tuple[str, str]]
) -> None:
    path = bad if bad.startswith("/") or not bad else str(bench.folder / bad)
    if bad.startswith(PROTECTED) and os.geteuid() == 0:
        run(
            bench, argv, str(bench.folder / "garbage/x")
        )  # root imports modules that user nobody may not read
        error()
        with unprivileged():
            code = run(bench, argv, path)
    else:
        code = run(bench, argv, path)
    out, err = error()
    left = list(tree(bench.folder / "work"))
    for file in (bench.folder / "work").iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    message = err.split("error: ", 1)[-1] if err.startswith("usage:") else err
    assert code == 2, (code, out, err)
    assert "Traceback" not in err and "bug in FGPT" not in err, err
    assert 1 <= len(message.splitlines()) <= 3, message
    assert all(c.isprintable() or c == "\n" for c in err + out), err
    assert left == [], "files were left behind"


def every_third(verbs: Sequence[tuple[str, ...]], kinds: Iterable[str]) -> list[Any]:
    """All pairs of a command line and a kind of path. Two of three are slow: in `make test` each
    command line meets a third of the kinds, and each kind a third of the command lines.
    """
    return [
        pytest.param(
            argv,
            kind,
            id=f"{' '.join(argv)}-{kind}",
            marks=() if (i + j) % 3 == 0 else pytest.mark.slow,
        )
        for i, argv in enumerate(verbs)
        for j, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(("argv", "kind"), every_third(READ, READ_PATHS))
def test_paths_to_read(
    bench: Bench, argv: tuple[str, ...], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if "--tmp" in argv and kind == "empty folder":
        return  # what it asks for
    check(bench, argv, READ_PATHS[kind], capfd.readouterr)


@pytest.mark.parametrize(("argv", "kind"), every_third(WRITE_FOLDER, [*WRITE_PATHS, "a file"]))
def test_folders_to_write(
    bench: Bench, argv: tuple[str, ...], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(bench, argv, {**WRITE_PATHS, "a file": "garbage"}[kind], capfd.readouterr)


@pytest.mark.parametrize(("argv", "kind"), every_third(WRITE_FILE, [*WRITE_PATHS, "a folder"]))
def test_files_to_write(
    bench: Bench, argv: tuple[str, ...], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(bench, argv, {**WRITE_PATHS, "a folder": "folder"}[kind], capfd.readouterr)
