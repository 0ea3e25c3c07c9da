"""The READMEs' commands, as written, in an environment with requirements.txt alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.docs.environment import is_importable, make_environment
from tests.docs.user import User, commands, make_user, reason_not_run, run_all
from tests.ranks import ROOT


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment") / "venv")


@pytest.fixture
def user(tmp_path: Path, scripts: Path) -> User:
    return make_user(tmp_path, scripts)


@pytest.mark.parametrize("name", ["README.md", "launchers/README.md", "data/README.md"])
def test_every_command_is_found(name: str) -> None:
    found = list(commands(ROOT / name))
    assert len(found) >= {"README.md": 27, "launchers/README.md": 5, "data/README.md": 10}[name]
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
    run_all(found, user)
