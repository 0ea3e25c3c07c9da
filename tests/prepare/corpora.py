"""A small generated corpus, and helpers to run and compare preparations."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from fgpt.data.recipe import Recipe, SourceSpec
from fgpt.prepare.pipeline import prepare
from fgpt.tokenizer.spec import TokenizerSpec

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


def prepared_again(corpus: Path, out: Path, workers: int | None = 2, **changes: object) -> None:
    """Prepare the folder `corpus` into `out`, without output."""
    prepare(small_recipe(corpus, **changes), out, progress=False, workers=workers)


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


# Prepares argv[1] (a folder) into argv[2]; argv[3] is a number k: the process kills itself at its
# k-th event on a file of the output (open, mkdir, rename, remove), 0 for never. Prints the count.
CHILD = """
import os, signal, sys
from pathlib import Path
from fgpt.data.recipe import SourceSpec
from fgpt.prepare.pipeline import prepare
from fgpt.data.recipe import Recipe
from fgpt.tokenizer.spec import TokenizerSpec
from fgpt.errors import DataError

folder, out, kill_at, force = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "force"
events, name = 0, os.path.basename(out)

def hook(event, args):
    global events
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        parts = Path(str(args[0])).parts
        if any(part == name or part.startswith("." + name + ".fgpt") for part in parts):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
recipe = Recipe("small", SourceSpec("local", folder), TokenizerSpec(400), validation_fraction=0.1)
try:
    prepare(recipe, out, progress=False, force=force)
except DataError as error:
    sys.exit(f"DataError: {error}")
print(events)
"""
