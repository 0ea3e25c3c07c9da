"""Bandwidth between each two nodes, in both directions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from fgpt.distributed.agreements import gather_json
from fgpt.distributed.launch import World
from fgpt.doctor.check import Check, Places, speed_text
from fgpt.doctor.devices import range_text

FIRST_BYTES, LAST_BYTES = 2**16, 2**25
ENOUGH_S = 0.1
"""Messages grow fourfold until one takes this long."""
LINK_RATIO = 0.6
"""A link below this fraction of the fast ones is slow. Lower than for devices: other jobs use the
network too."""
MAX_ROUNDS = 64
"""Each node is measured with at most so many others."""

Links = Mapping[tuple[str, str], float]
"""(from node, to node) -> bytes per second."""


def rounds(n: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of n players once, in rounds in which each plays at most once (circle method)."""
    players: list[int | None] = [*range(n), *([None] if n % 2 else [])]
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        players = [players[0], players[-1], *players[1:-1]]


def measure_links(world: World, device: torch.device, places: Places) -> Links:
    """Measure each pair of nodes between their lowest ranks; pairs of a round at the same time.

    All ranks call this, and get all results; empty with one node.
    """
    leaders = [places.nodes.index(node) for node in places.distinct]
    own: list[tuple[str, str, float]] = []
    for pairs in itertools.islice(rounds(len(leaders)), MAX_ROUNDS):
        for pair in pairs:
            low, high = (leaders[index] for index in pair)
            if world.rank == low:
                rate = _send(high, device)
                own.append((places.nodes[low], places.nodes[high], rate))
                _receive(high, device)
            elif world.rank == high:
                _receive(low, device)
                rate = _send(low, device)
                own.append((places.nodes[high], places.nodes[low], rate))
    gathered = [link for links in gather_json(own, device) for link in links]
    return {(source, target): rate for source, target, rate in gathered}


def _send(peer: int, device: torch.device) -> float:
    """Send growing messages to a peer that receives; returns bytes per second of the last one."""
    size = FIRST_BYTES
    _exchange(0, peer, device)  # connects
    while True:
        data = torch.zeros(size, dtype=torch.uint8, device=device)
        start = time.perf_counter()
        dist.send(data, peer)
        _word(peer, device)  # the peer has it
        seconds = time.perf_counter() - start
        is_last = seconds >= ENOUGH_S or size >= LAST_BYTES
        size_next = 0 if is_last else 4 * size
        dist.send(torch.tensor([size_next], device=device), peer)
        if is_last:
            return size / seconds
        size = size_next


def _receive(peer: int, device: torch.device) -> None:
    """The other side of `_send`."""
    size = FIRST_BYTES
    _exchange(0, peer, device)
    while size:
        dist.recv(torch.empty(size, dtype=torch.uint8, device=device), peer)
        dist.send(torch.tensor([1], device=device), peer)
        size = _word(peer, device)


def _exchange(word: int, peer: int, device: torch.device) -> None:
    """Send a word and receive one; the lower rank sends first."""
    if dist.get_rank() < peer:
        dist.send(torch.tensor([word], device=device), peer)
        _word(peer, device)
    else:
        _word(peer, device)
        dist.send(torch.tensor([word], device=device), peer)


def _word(peer: int, device: torch.device) -> int:
    word = torch.empty(1, dtype=torch.int64, device=device)
    dist.recv(word, peer)
    return int(word)


def judge_links(links: Links, places: Places) -> list[Check]:
    """Name nodes whose links are all slow in a direction, else each slow link; slowest first."""
    if not links:
        return []
    title = "network between nodes"
    # one node of three may have two thirds of all links, so the median could be a slow one
    fast = sorted(links.values())[-max(1, len(links) // 4)]
    slow = {link for link, rate in links.items() if rate < LINK_RATIO * fast}
    ends = [
        (node, verb, [link for link in links if link[end] == node])
        for node in places.distinct
        for end, verb in ((0, "sends"), (1, "receives"))
    ]
    ends = [(node, verb, own) for node, verb, own in ends if slow.issuperset(own)]
    checks = []
    for node, verb, own in sorted(ends, key=lambda end: max(links[link] for link in end[2])):
        unexplained = [link for link in own if link in slow]
        if len(unexplained) > 1:
            rates = range_text([links[link] for link in unexplained], "B")
            value = f"{node} {verb} at {rates.removesuffix(' per rank')}"
            checks.append(_slow(title, f"{value}, fast links have {speed_text(fast, 'B')}"))
            slow.difference_update(unexplained)
    for source, target in sorted(slow, key=lambda link: links[link]):
        value = f"{source} to {target}: {speed_text(links[source, target], 'B')}"
        checks.append(_slow(title, f"{value}, fast links have {speed_text(fast, 'B')}"))
    if checks:
        return checks
    rates = range_text(list(links.values()), "B").replace("per rank", "each way")
    return [Check("ok", title, f"{len(places.distinct)} nodes, {rates}")]


def _slow(title: str, value: str) -> Check:
    remedy = "look at that node's network adapter, cable, switch port and rate limits"
    return Check("slow", title, value, remedy)
