"""Which interface gloo is given, for hosts that know themselves and each other by other names."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest
import torch.distributed as dist

from fgpt.distributed import interfaces
from fgpt.errors import LaunchError


@dataclass(frozen=True)
class View:
    """What one host sees: rank 0's address, its own on the way there, and that of its name."""

    master: str
    own: str
    named: str


@dataclass(frozen=True)
class Address:
    """One of an interface's, as psutil has it."""

    address: str
    family: socket.AddressFamily = socket.AF_INET


NODE0, NODE1 = "10.77.0.1", "10.77.0.2"
LOOPBACK = "127.0.1.1"
LOCAL = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def ask(view: View, size: int, store: dist.Store, environ: Mapping[str, str]) -> str | None:
    """What a rank on a host with this view, with lo and eth0, is told."""
    with pytest.MonkeyPatch.context() as patch:
        here = NODE0 if view.own in (LOOPBACK, NODE0) else NODE1
        addresses = {"lo": [Address("127.0.0.1")], "eth0": [Address(here)]}
        patch.setattr(psutil, "net_if_addrs", lambda: addresses)
        patch.setattr(interfaces, "_resolve", lambda _: (view.master, view.own))
        patch.setattr(interfaces, "_address_of_own_name", lambda: view.named)
        return interfaces.reachable_interface(size, store, {"MASTER_ADDR": "node0", **environ})


def told(*views: View, **environ: str) -> list[str | None]:
    """What each rank is told; the last one asks first, as rank 0 may have to wait for others."""
    store = dist.HashStore()
    return [ask(view, len(views), store, environ) for view in views[::-1]][::-1]


def test_names_that_others_know_too_change_nothing() -> None:
    assert told(View(NODE0, NODE0, NODE0), View(NODE0, NODE1, NODE1)) == [None, None]


def test_debians_names() -> None:
    """Rank 0's host learns its address from the others."""
    views = View(LOOPBACK, LOOPBACK, LOOPBACK), View(NODE0, NODE1, LOOPBACK)
    assert told(*views) == ["eth0", "eth0"]
    assert told(*views, GLOO_SOCKET_IFNAME="eth0") == [None, None]


def test_all_ranks_on_one_host() -> None:
    """As with torchrun --nnodes 2 on one machine: gloo's choice is right, and nobody waits."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(interfaces.reachable_interface, 2, store, LOCAL) for store in stores]
        assert [answer.result(30) for answer in asked] == [None, None]


def test_a_loopback_interface_is_refused() -> None:
    with pytest.raises(LaunchError, match="GLOO_SOCKET_IFNAME=lo: .* 127.0.0.1: export .*=eth0,"):
        told(View(NODE0, NODE0, NODE0), View(NODE0, NODE1, NODE1), GLOO_SOCKET_IFNAME="lo")


def test_an_address_that_no_interface_has() -> None:
    """Rank 0's host behind a translated address."""
    with pytest.raises(LaunchError, match=r"no interface has 8\.8\.8\.8, .* one of eth0$"):
        told(View(LOOPBACK, LOOPBACK, LOOPBACK), View("8.8.8.8", NODE1, NODE1))
