"""Fixtures for several folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import settings

from fgpt.data.recipe import Recipe
from fgpt.data.token_dataset import TokenDataset, open_token_dataset
from fgpt.prepare.pipeline import prepare
from tests.prepare.corpora import small_recipe, tree, write_corpus
from tests.ranks import GONE_S
from tests.tiny import Tiny

# examples may take long on a busy machine
settings.register_profile("fgpt", deadline=None)
settings.load_profile("fgpt")


@pytest.fixture(autouse=True)
def gone_s(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Records the longest of GONE_S for `make test-faults`."""
    GONE_S.clear()
    yield
    if GONE_S:
        record_property("gone_s", max(GONE_S))


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set with 400 ids. Read-only."""
    folder = tmp_path_factory.mktemp("small")
    out = folder / "prepared"
    prepare(small_recipe(write_corpus(folder / "texts")), out, progress=False)
    return out


@pytest.fixture
def tiny(tmp_path: Path, small_data: Path) -> Tiny:
    """Tiny training runs in the test's directory."""
    return Tiny(tmp_path, small_data)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def recipe(corpus: Path) -> Recipe:
    return small_recipe(corpus)


@pytest.fixture(scope="session")
def prepared(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Read-only: copy its directory before changing anything."""
    out = tmp_path_factory.mktemp("prepared") / "small"
    prepare(recipe, out, progress=False)
    return open_token_dataset(out)


@pytest.fixture
def copy_of(prepared: TokenDataset, tmp_path: Path) -> Callable[[], Path]:
    """A function that makes a copy of the prepared directory."""

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
    monkeypatch.setattr("fgpt.prepare.sources.local.TASK_BYTES", 6000)
