"""The network interface for gloo between hosts.

Gloo listens on the address that the host's own name means. Debian's /etc/hosts makes that
127.0.1.1, where other hosts would find only themselves; a name that nothing resolves is the same.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Mapping

import psutil
import torch.distributed as dist

from fgpt.errors import LaunchError

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_ADDRESS_KEY = "fgpt/rank 0's address"
_COUNT_KEY = "fgpt/ranks that know rank 0's address, or cannot"
_NONE = "none"
_LOOPBACK = "127.0.0.1"


def check_interfaces(environ: Mapping[str, str]) -> None:
    """Raise LaunchError if GLOO_SOCKET_IFNAME names an interface that this host does not have."""
    known = psutil.net_if_addrs()
    for name in environ.get(GLOO_INTERFACE, "").split(","):
        if name and name not in known:
            raise LaunchError(
                f"{GLOO_INTERFACE}: this host has no network interface {name!r}; it has"
                f" {', '.join(known)}: name one of these, or unset the variable"
            )


def reachable_interface(size: int, store: dist.Store, environ: Mapping[str, str]) -> str | None:
    """Return the interface that gloo must use, where it would listen on a loopback address although
    the ranks are on several hosts; None if gloo's choice, or the user's, is right.

    All `size` ranks call it. Raises LaunchError if no interface will do.
    """
    # 1. MASTER_ADDR as this host resolves it; only other hosts know what it is for them
    master, own = _resolve(environ["MASTER_ADDR"])
    if not _is_loopback(master):
        store.set(_ADDRESS_KEY, master)
    if store.add(_COUNT_KEY, 1) == size:
        store.compare_set(_ADDRESS_KEY, "", _NONE)  # every rank is on rank 0's host
    # 2. where gloo would listen
    named = environ.get(GLOO_INTERFACE, "")
    listens_at = _address_of(named.partition(",")[0]) if named else _address_of_own_name()
    if not _is_loopback(listens_at):
        return None
    # 3. the address that other hosts can reach, and its interface
    if _is_loopback(own):
        own = store.get(_ADDRESS_KEY).decode()
    if own == _NONE:
        return None
    interface = _interface_with(own)
    host = socket.gethostname()
    if interface is None:
        choices = ", ".join(name for name in psutil.net_if_addrs() if name != "lo")
        raise LaunchError(
            f"{host}: gloo would listen on {listens_at}, which other hosts cannot reach, and no"
            f" interface has {own}, by which they know this host: export {GLOO_INTERFACE}, one of"
            f" {choices}"
        )
    if named:
        raise LaunchError(
            f"{host}: {GLOO_INTERFACE}={named}: other hosts cannot reach {listens_at}: export"
            f" {GLOO_INTERFACE}={interface}, or unset it"
        )
    return interface


def _resolve(host: str) -> tuple[str, str]:
    """Return the address of a host, and that of this one on the way there; no packet is sent."""
    for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(address[0]), str(probe.getsockname()[0])
    return _LOOPBACK, _LOOPBACK


def _address_of_own_name() -> str:
    """The address that torch chooses: the first of the host's name that can be listened on."""
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM)
        for family, kind, _, _, address in found:
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return str(address[0])
    return _LOOPBACK


def _address_of(interface: str) -> str:
    """The first address of an interface; without any, gloo will say so."""
    addresses = psutil.net_if_addrs().get(interface, [])
    internet = (socket.AF_INET, socket.AF_INET6)
    return next((a.address for a in addresses if a.family in internet), "")


def _interface_with(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    return None


def _is_loopback(address: str) -> bool:
    """Whether an address, maybe with an IPv6 zone (%eth0), is one of this host alone."""
    return bool(address) and ipaddress.ip_address(address.partition("%")[0]).is_loopback
