"""A user who types the commands of a document: which they are, and where they run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.cli.parse_only import FIRST_WORDS
from tests.prepare.megatron import write as write_megatron
from tests.ranks import ROOT, free_port

EXTRAS = ("", "-bench", "-dev")
CLONED = ("Makefile", "setup.py", "pyproject.toml", *(f"requirements{n}.txt" for n in EXTRAS))
"""Files that make reads."""
TRAINING = (
    "--steps 2 --set eval.every=0 --set sample.tokens=0 --set checkpoint.every=0"
    " --set model.n_layer=2 --set model.max_seq_len=64"
).split()
"""Appended to training, to keep it short."""
NARROW = ["--set", "model.d_model=96"]
"""Appended to training of a large model."""
RESUMED = ["--steps", "3"]
"""Appended to training that resumes what TRAINING has ended."""
SHORTER = {
    "fgpt parity": "--steps 2 --layouts tp2,zero3",
    "fgpt resume-check": "--steps 2 --layouts same --set data.seq_len=64",
    "fgpt bench single": "--rows seed-1m --only base --minutes 0.01",
    "fgpt eval": "--samples 8",
    "fgpt generate": "--max_tokens 8",
}
"""Appended to the commands with this beginning."""
NOT_RUN = {
    "make test": "it runs this test",
    "make bench": "it installs the peers that it compares with",
    "make fmt": "it installs the tools of development",
    "make check": "the same",
    "make pretrained": "it trains for 20 minutes",
    "python -m pytest": "it needs the tests' packages, and root",
    "fgpt prepare --recipe data/recipes/wikipedia-zh.json": "it needs the Hub",
    "fgpt prepare --dataset roneneldan": "it needs the Hub",
    "torchrun --nnodes 4": "it needs four nodes",
    "deepspeed --hostfile": "it needs several nodes",
}


@dataclass(frozen=True)
class User:
    """Someone with a clone, texts, and the environment of `make train`."""

    home: Path
    scripts: Path

    @property
    def clone(self) -> Path:
        return self.home / "fgpt"

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in the clone."""
        variables = {
            "HOME": str(self.home),
            "PATH": f"{self.scripts}:{os.environ['PATH']}",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return subprocess.run(
            words,
            cwd=self.clone,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )


def make_user(home: Path, scripts: Path) -> User:
    """A clone, texts, shards of Megatron's and a DeepSpeed JSON, and an environment's scripts."""
    user = User(home, scripts)
    # 1. a clone: links, so that what is written stays outside of the repository
    user.clone.mkdir()
    for file in ("fgpt", "ds_configs", "launchers", *CLONED):
        (user.clone / file).symlink_to(ROOT / file)
    (user.clone / "data").mkdir()
    (user.clone / "data" / "recipes").symlink_to(ROOT / "data" / "recipes")
    # 2. texts, shards of Megatron's, and a DeepSpeed JSON
    (user.home / "texts").mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.glob("*.py"))[:60]:
        (user.home / "texts" / f"{file.stem}.txt").write_text(file.read_text(errors="replace"))
    speech = "Enter {0}\nreads line {0} of the play aloud.\n\n"
    (user.clone / "play.txt").write_text("".join(speech.format(i) for i in range(2000)))
    (user.clone / "books").mkdir()
    (user.clone / "books" / "one.txt").write_text("A book. " * 200)
    articles = pa.table({"text": [f"Article number {i}." for i in range(100)]})
    pq.write_table(articles, user.clone / "articles.parquet")
    (user.clone / "megatron").mkdir()
    documents = [[list(range(100 + i, 200 + i))] for i in range(100)]
    write_megatron(user.clone / "megatron" / "my_text_document", documents, np.uint16)
    mine = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}, "backend": "nccl"}
    (user.home / "mine.json").write_text(json.dumps(mine))
    return user


def commands(document: Path) -> Iterator[str]:
    """The commands of a document's indented blocks, and the trainings elsewhere in its lines."""
    text = re.sub(r"\\\n\s*", "", document.read_text())
    for line in text.splitlines():
        if line.startswith("    "):
            candidates = [re.split(r" {3,}|  +#", line.strip())[0]]
        else:
            candidates = re.findall(r"`([^`]+ launchers/train.py [^`]+)`", line)
        for candidate in candidates:
            first, _, rest = candidate.removeprefix("$ ").partition(" ")
            if first in FIRST_WORDS and rest:
                yield candidate.removeprefix("$ ")


def make(user: User, target: str) -> list[str]:
    """`make TARGET` with the environment in place of the one that it would install."""
    words = ["make", f"VENV={user.scripts.parent}", target, f"ARGS={' '.join(TRAINING)}"]
    for stamp in re.findall(r"^touch (\S+)", user.run([*words, "-n"]).stdout, re.M):
        Path(stamp).touch()
    return words


def reason_not_run(command: str) -> str:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), "")


def shortened(command: str, user: User) -> list[str]:
    """The command as a shell reads it, and what makes it short."""
    words = [word.replace("~", str(user.home), 1) for word in shlex.split(command)]
    if words[0] == "make":
        return make(user, words[1])
    if "launchers/train.py" in words or words[:2] == ["fgpt", "train"]:
        narrow = NARROW if "gpt2" in words else []
        return words + TRAINING + narrow + (RESUMED if "--resume" in words else [])
    for start, more in SHORTER.items():
        if command.startswith(start):
            return words + more.split()
    return words


def run_all(found: Iterable[str], user: User) -> None:
    """Run commands, each once, and fail if one does."""
    for command in dict.fromkeys(found):
        if not reason_not_run(command):
            done = user.run(shortened(command, user))
            assert done.returncode == 0, f"{command}\n{done.stdout[-900:]}\n{done.stderr[-900:]}"
