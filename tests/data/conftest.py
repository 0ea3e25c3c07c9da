"""The prepared data set of a small corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fgpt.data.prepare.pipeline import prepare
from fgpt.data.prepared import Prepared, open_prepared
from fgpt.data.recipe import Recipe
from tests.data.corpora import small_recipe, tree, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def recipe(corpus: Path) -> Recipe:
    return small_recipe(corpus)


@pytest.fixture(scope="session")
def prepared(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Read-only: copy its directory before changing anything."""
    out = tmp_path_factory.mktemp("prepared") / "small"
    prepare(recipe, out, progress=False)
    return open_prepared(out)


@pytest.fixture
def copy_of(prepared: Prepared, tmp_path: Path) -> Callable[[], Path]:
    """A function that gives a fresh copy of the prepared directory."""

    def copy() -> Path:
        target = tmp_path / "copy"
        target.mkdir()
        for name, data in tree(prepared.path).items():
            (target / name).write_bytes(data)
        return target

    return copy


@pytest.fixture
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small corpus in a dozen tasks."""
    monkeypatch.setattr("fgpt.data.corpus.local.TASK_BYTES", 6000)
