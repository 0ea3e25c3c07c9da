"""The C extension is built by setup.py; without it the other encoders are used, in one line."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpt.data.recipe import Recipe, SourceSpec
from fgpt.errors import DataError
from fgpt.prepare import pipeline
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.base import Tokenizer
from fgpt.tokenizer.encoders import EncoderSpec, choose_encoder
from fgpt.tokenizer.errors import FastEncoderUnavailable
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from fgpt.tokenizer.wordwise import encoder

ROOT = Path(__file__).parents[2]
SAMPLE = [b"def f(x):\n    return x\n"]
CODE = ["def f(x):\n    return x\n"] * 50
BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
INSTALL = r"install a C compiler and Python's headers, then reinstall fgpt \(pip install -e \.\)"


@pytest.fixture(scope="module")
def unigram() -> Tokenizer:
    return train_tokenizer(TokenizerSpec(300, kind="sentencepiece-unigram"), CODE)


def copied_sources(folder: Path) -> Path:
    """The package without built files, in a folder of its own."""
    built = shutil.ignore_patterns("*.so", "__pycache__", "results")
    shutil.copytree(ROOT / "fgpt", folder / "fgpt", ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_it_is_built() -> None:
    """Fails, and is not skipped, where it should be there: run `make install`, or BUILD here."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    assert encoder.load_library().wordwise_new


CHOOSE = """
from fgpt.tokenizer.encoders import choose_encoder
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
spec = TokenizerSpec(300, kind="sentencepiece-unigram")
print(choose_encoder(train_tokenizer(spec, ["def f(x):"] * 50), [])[1])
"""


def test_without_a_compiler_and_with_other_sources(tmp_path: Path) -> None:
    """Not built, failed to build, built, and built before a change."""
    folder, choose = copied_sources(tmp_path), [sys.executable, "-c", CHOOSE]
    missing = "sentencepiece (exact): wordwise is not built: install a C compiler"
    assert run(choose, folder).startswith(missing)
    run(BUILD, folder, CC="/nonexistent/cc")
    assert run(choose, folder).startswith(missing)
    run(BUILD, folder)
    assert run(choose, folder).startswith("wordwise: ids equal")
    source = folder / "fgpt/tokenizer/wordwise/trie.c"
    source.write_text(source.read_text() + "/* changed */\n")
    stale = run(choose, folder)
    assert stale.startswith("sentencepiece (exact): wordwise was built from other sources: ")
    assert stale.count("\n") == 1
    run(BUILD, folder)
    assert run(choose, folder).startswith("wordwise: ids equal")


def test_the_wheel_has_the_module_and_the_sdist_the_sources(tmp_path: Path) -> None:
    folder = copied_sources(tmp_path / "sources")
    build = "import setuptools.build_meta as b; b.build_wheel('{0}'); b.build_sdist('{0}')"
    (tmp_path / "dist").mkdir()
    run([sys.executable, "-c", build.format(tmp_path / "dist")], folder)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any("wordwise/_wordwise." in name for name in names)
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    unpacked = {file.name for file in tmp_path.glob("unpacked/*/fgpt/tokenizer/wordwise/*.[ch]")}
    assert unpacked == {file.name for file in (ROOT / "fgpt/tokenizer/wordwise").glob("*.[ch]")}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named"), f"wordwise is not built: {INSTALL}"),
        (ImportError("file too short"), f"wordwise cannot be loaded .file too short.: {INSTALL}"),
        (None, "wordwise was built from other sources: build it again with: pip install -e ."),
    ],
)
def test_an_extension_that_cannot_be_used(
    error: Exception | None, message: str, unigram: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> Any:
        if error:
            raise error
        return SimpleNamespace(SOURCE_HASH="of other sources", __file__="")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(FastEncoderUnavailable, match=message):
        encoder.load_library()
    spec, why = choose_encoder(unigram, SAMPLE)
    assert not spec.is_fast and why.startswith("sentencepiece (exact): wordwise ")
    assert "\n" not in why
    with pytest.raises(DataError, match=f"the fast encoder cannot be used: {message}"):
        choose_encoder(unigram, SAMPLE, "fast")


def test_gigatoken_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken", reason="pip install 'fgpt[fast]'")
    bpe = train_tokenizer(TokenizerSpec(300, kind="sentencepiece-bpe"), CODE)
    monkeypatch.setitem(sys.modules, "fgpt.tokenizer.wordwise._wordwise", None)
    _, why = choose_encoder(bpe, SAMPLE)
    assert why.startswith("gigatoken 0.") and "wordwise is not built: install a C" in why


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_cannot_use_the_fast_encoder(
    workers: int,
    unigram: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The work begins again with the library."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text(f"def f({i}):\n    return x\n" * 50)
    unigram.save(tmp_path / "tokenizer.model")
    spec = TokenizerSpec(path=str(tmp_path / "tokenizer.model"))
    recipe = Recipe("unusable", SourceSpec("local", str(texts)), spec, 0.1)
    expected = prepare(recipe, tmp_path / "exact", encoder="exact", progress=False)
    choose = pipeline.choose_encoder

    def choose_unusable(*args: Any) -> tuple[EncoderSpec, str]:
        chosen, why = choose(*args)
        return replace(chosen, fast_encoder="gigatoken") if chosen.is_fast else chosen, why

    monkeypatch.setattr(pipeline, "choose_encoder", choose_unusable)
    card = prepare(recipe, tmp_path / "out", workers=workers)
    printed = capfd.readouterr().err
    assert card.train == expected.train and "Traceback" not in printed
    assert "gigatoken does not support sentencepiece-unigram" in printed
    assert "starting again with the exact encoder" in printed


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The tests of the ids with a build that ends at a read or write out of bounds.

    (Not the test of the memory: a sanitizer keeps what is freed.)
    """
    libraries = [
        subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library.strip()).is_absolute() for library in libraries):
        pytest.skip("this compiler has no sanitizers")
    folder = copied_sources(tmp_path)
    shutil.copytree(ROOT / "tests", folder / "tests")
    run(BUILD, folder, CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g")
    (built,) = folder.glob("fgpt/tokenizer/wordwise/_wordwise*.so")
    assert b"__asan_" in built.read_bytes()
    test = "tests/tokenizer/test_wordwise.py"
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run(
        [*pytest_command, "-k", "not bounded", test],
        folder,
        LD_PRELOAD=" ".join(map(str.strip, libraries)),
        ASAN_OPTIONS="detect_leaks=0",
    )
