"""Hosts for the tests of this folder, which are skipped where none can be made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests.nodes.hosts import Hosts, why_no_hosts

MakeHosts = Callable[..., Hosts]
_why_no_hosts = cache(why_no_hosts)


@pytest.fixture
def make_hosts(tmp_path: Path) -> Iterator[MakeHosts]:
    """A function that makes hosts, which end with the test."""
    if reason := _why_no_hosts():
        pytest.skip(reason)
    with ExitStack() as ending:

        def make(n: int, names: Sequence[str] | None = None) -> Hosts:
            return ending.enter_context(Hosts(n, tmp_path, names))

        yield make


@pytest.fixture
def hosts_2(make_hosts: MakeHosts) -> Hosts:
    """Two hosts."""
    return make_hosts(2)


@pytest.fixture
def hosts_3(make_hosts: MakeHosts) -> Hosts:
    """Three hosts."""
    return make_hosts(3)
