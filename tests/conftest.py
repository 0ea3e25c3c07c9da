"""What the tests of several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from fgpt.data.prepare.pipeline import prepare
from tests.data.corpora import small_recipe, write_corpus
from tests.tiny import Tiny

# an example may take long where the machine has other work
settings.register_profile("fgpt", deadline=None)
settings.load_profile("fgpt")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set with 400 ids. Read-only."""
    folder = tmp_path_factory.mktemp("small")
    out = folder / "prepared"
    prepare(small_recipe(write_corpus(folder / "texts")), out, progress=False)
    return out


@pytest.fixture
def tiny(tmp_path: Path, small_data: Path) -> Tiny:
    """Tiny training runs below the test's own directory."""
    return Tiny(tmp_path, small_data)
