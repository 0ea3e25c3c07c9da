"""A small corpus that the tests write themselves, and how they run and compare things."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from fgpt.data.corpus import SourceSpec
from fgpt.data.recipe import Recipe, TokenizerSpec

REPOSITORY = Path(__file__).parents[2]


def write_corpus(folder: Path, documents: int = 80, words: int = 200) -> Path:
    """A folder of .txt files with made-up words, the same at every call."""
    draw = random.Random(7)
    lexicon = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(300)]
    folder.mkdir(parents=True)
    for i in range(documents):
        text = " ".join(draw.choices(lexicon, k=words)) + ".\n"
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def small_recipe(path: Path, **changes: object) -> Recipe:
    """A recipe over the folder `path`."""
    settings: dict = {"validation_fraction": 0.1, "tokenizer": TokenizerSpec(vocab_size=400)}
    return Recipe("small", SourceSpec("local", str(path)), **(settings | changes))


def tree(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_python(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that can import fgpt."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
