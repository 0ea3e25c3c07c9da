"""The READMEs' commands, as written, in an environment with requirements.txt alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.docs.environment import is_importable, make_environment
from tests.prepare.megatron import write as write_megatron
from tests.ranks import ROOT, free_port

WORDS = ("accelerate", "deepspeed", "fgpt", "make", "python", "torchrun")
"""First words of commands."""
EXTRAS = ("", "-bench", "-dev")
CLONED = ("Makefile", "setup.py", "pyproject.toml", *(f"requirements{n}.txt" for n in EXTRAS))
"""Files that make reads."""
TRAINING = (
    "--steps 2 --set eval.every=0 --set sample.tokens=0 --set checkpoint.every=0"
    " --set model.n_layer=2 --set model.max_seq_len=64"
).split()
"""Appended to training, to keep it short."""
SHORTER = {
    "fgpt parity": "--steps 2",
    "fgpt resume-check": "--steps 2 --layouts same --set data.seq_len=64",
    "fgpt bench single": "--rows seed-1m --only base --minutes 0.01",
}
"""Appended to the commands with this beginning."""
NOT_RUN = {
    "make test": "it runs this test",
    "make bench": "it installs the peers that it compares with",
    "make fmt": "it installs the tools of development",
    "make check": "the same",
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


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment") / "venv")


@pytest.fixture
def user(tmp_path: Path, scripts: Path) -> User:
    user = User(tmp_path, scripts)
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
    speech = "Enter {0}\nspeaks a line of his own, number {0}, to nobody in particular.\n\n"
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


def commands(readme: Path) -> Iterator[str]:
    """The commands of a README's indented blocks, and the trainings elsewhere in its lines."""
    text = re.sub(r"\\\n\s*", "", readme.read_text())
    for line in text.splitlines():
        if line.startswith("    "):
            candidates = [re.split(r" {3,}|  +#", line.strip())[0]]
        else:
            candidates = re.findall(r"`([^`]+ launchers/train.py [^`]+)`", line)
        for candidate in candidates:
            first, _, rest = candidate.removeprefix("$ ").partition(" ")
            if first in WORDS and rest:
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
    if "launchers/train.py" in words:
        return words + TRAINING
    for start, more in SHORTER.items():
        if command.startswith(start):
            return words + more.split()
    return words


@pytest.mark.parametrize("name", ["README.md", "launchers/README.md", "data/README.md"])
def test_every_command_is_found(name: str) -> None:
    found = list(commands(ROOT / name))
    assert len(found) >= {"README.md": 19, "launchers/README.md": 5, "data/README.md": 10}[name]
    assert any(not reason_not_run(command) for command in found)


def test_the_environment_is_requirements_alone(user: User) -> None:
    assert is_importable(user.scripts, "deepspeed")
    for package in ("transformers", "pytest", "tensorboard", "bitsandbytes"):
        assert not is_importable(user.scripts, package)


@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("readmes", "prepared"),
    [(["data/README.md"], ["a", "b"]), (["README.md", "launchers/README.md"], ["a", "b", "mine"])],
    ids=["data", "launchers"],
)
def test_commands(user: User, readmes: Sequence[str], prepared: Sequence[str]) -> None:
    """`prepared`: the data sets that the commands take for granted."""
    found = [f"fgpt prepare --input ~/texts --out data/prepared/{name}" for name in prepared]
    found += [command for readme in readmes for command in commands(ROOT / readme)]
    for command in dict.fromkeys(found):
        if not reason_not_run(command):
            done = user.run(shortened(command, user))
            assert done.returncode == 0, f"{command}\n{done.stdout[-900:]}\n{done.stderr[-900:]}"
