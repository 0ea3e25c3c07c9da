"""The C code is compiled once, or its absence is said in a line and the library encodes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fgpt.data.recipe import Recipe, SourceSpec
from fgpt.errors import DataError
from fgpt.prepare import pipeline
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer import (
    EncoderSpec,
    NoFastEncoder,
    Tokenizer,
    TokenizerSpec,
    choose_encoder,
    train_tokenizer,
)
from fgpt.tokenizer.wordwise import build
from fgpt.tokenizer.wordwise.encoder import WordSettings

SAMPLE = [b"def f(x):\n    return x\n"]


@pytest.fixture(scope="module")
def unigram() -> Tokenizer:
    spec = TokenizerSpec(300, kind="sentencepiece-unigram")
    return train_tokenizer(spec, ["def f(x):\n    return x\n"] * 50)


def compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    script = f'echo called >> {log}; exec cc "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", script))
    folders = [tmp_path / "a" / "b", tmp_path / "c"]
    with ThreadPoolExecutor(4) as pool:  # all at once: each may compile, all get a complete one
        found = set(pool.map(lambda _: build.shared_object(folders), range(4)))
    assert len(found) == 1 and log.read_text().count("called") <= 4
    (file,) = found
    assert file.parent == folders[0] and [file] == [*folders[0].iterdir()]
    assert ctypes.CDLL(str(file)).words_new
    log.write_text("")
    assert build.shared_object(folders) == file and not log.read_text()
    assert build.shared_object([folders[1], folders[0]]) == file  # wherever it is


def test_other_sources_or_flags_have_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.shared_object([tmp_path])
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    second = build.shared_object([tmp_path])
    assert first != second and first.exists()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    good = tmp_path / "cache"
    assert build.shared_object([file / "below", good]).parent == good
    with pytest.raises(NoFastEncoder, match="no folder for compiled sources"):
        build.shared_object([file / "below"])


def test_what_others_can_change_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all, own = tmp_path / "open", tmp_path / "own"
    file = build.shared_object([open_to_all])
    open_to_all.chmod(0o777)
    assert build.shared_object([open_to_all, own]).parent == own
    open_to_all.chmod(0o755)
    assert build.shared_object([open_to_all]) == file
    file.chmod(0o775)
    assert build.shared_object([open_to_all, own]).parent == own
    (tmp_path / "link").symlink_to(open_to_all)
    with pytest.raises(NoFastEncoder, match="no folder for compiled sources"):
        build.shared_object([tmp_path / "link"])
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert all(folder.is_absolute() for folder in build._folders())


def test_it_is_found_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    file = build.shared_object([tmp_path])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.shared_object([tmp_path]) == file


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'words.h:1: error: no room' >&2; exit 1", "failed (words.h:1: error: no room)"),
        ("exit 3", "failed (exit code 3)"),
        (r"printf '\351 error' >&2; exit 1", "failed (\ufffd error)"),
        (None, "cannot be run"),
    ],
)
def test_a_compiler_that_fails(
    script: str | None,
    why: str,
    unigram: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", script) if script else "/nowhere/cc")
    monkeypatch.setattr(build, "_folders", lambda: [tmp_path / "out"])
    spec, told = choose_encoder(unigram, SAMPLE)
    assert not spec.fast and why in told and "\n" not in told
    assert told.startswith("sentencepiece (exact): the C compiler ")
    assert not [*(tmp_path / "out").iterdir()]
    with pytest.raises(DataError, match="the fast encoder cannot be used: the C compiler"):
        choose_encoder(unigram, SAMPLE, "fast")


def test_a_command_that_is_none(unigram: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc '")
    _, told = choose_encoder(unigram, SAMPLE)
    assert "CC is no command" in told


@pytest.mark.parametrize("workers", [0, 2])
def test_it_vanishes_before_the_work(
    workers: int,
    unigram: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As if a cache were cleaned in between: the work begins again with the library."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text(f"def f({i}):\n    return x\n" * 50)
    unigram.save(tmp_path / "tokenizer.model")
    spec = TokenizerSpec(path=str(tmp_path / "tokenizer.model"))
    recipe = Recipe("vanishes", SourceSpec("local", str(texts)), spec, 0.1)
    expected = prepare(recipe, tmp_path / "exact", encoder="exact", progress=False)
    choose = pipeline.choose_encoder

    def vanished(*args: Any) -> tuple[EncoderSpec, str]:
        chosen, why = choose(*args)
        if isinstance(chosen.settings, WordSettings):
            gone = replace(chosen.settings, shared_object=str(tmp_path / "gone.so"))
            chosen = replace(chosen, settings=gone)
        return chosen, why

    monkeypatch.setattr(pipeline, "choose_encoder", vanished)
    card = prepare(recipe, tmp_path / "out", workers=workers)
    told = capfd.readouterr().err
    assert card.train == expected.train and "Traceback" not in told
    assert "wordwise cannot be loaded" in told and "beginning again, the exact way" in told


def test_no_compiler(unigram: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "_folders", lambda: [tmp_path])
    spec, told = choose_encoder(unigram, SAMPLE)
    assert not spec.fast and "no C compiler: install one (gcc, clang) or set CC" in told


def test_a_damaged_shared_object(
    unigram: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "_folders", lambda: [tmp_path])
    file = build.shared_object()
    file.write_bytes(file.read_bytes()[:100])
    spec, told = choose_encoder(unigram, SAMPLE)
    assert not spec.fast and "wordwise cannot be loaded" in told


@pytest.mark.slow
def test_no_fault_that_sanitizers_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of the ids once more; a read or write out of bounds ends them.

    (Not that of the memory: a sanitizer keeps what is freed.)
    """
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -g"
    libraries = [
        subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library.strip()).is_absolute() for library in libraries):
        pytest.skip("this compiler has no sanitizers")
    environment = {
        **build.os.environ,
        "CC": f"cc {flags}",
        "LD_PRELOAD": " ".join(map(str.strip, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    test = Path(__file__).with_name("test_wordwise.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not bounded"]
    command.append(str(test))
    root = Path(__file__).parents[3]
    monkeypatch.setenv("CC", environment["CC"])
    try:
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    finally:
        build.shared_object().unlink()
    assert done.returncode == 0, done.stdout + done.stderr
