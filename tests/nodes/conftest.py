"""Hosts for the tests of this folder, which are skipped where none can be made."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.nodes.hosts import Hosts, why_no_hosts

_why_no_hosts = cache(why_no_hosts)


@pytest.fixture
def hosts_2(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts."""
    yield from _hosts(2, tmp_path)


@pytest.fixture
def hosts_3(tmp_path: Path) -> Iterator[Hosts]:
    """Three hosts."""
    yield from _hosts(3, tmp_path)


def _hosts(n: int, folder: Path) -> Iterator[Hosts]:
    if reason := _why_no_hosts():
        pytest.skip(reason)
    with Hosts(n, folder) as hosts:
        yield hosts
