"""All checks, in the page's order: every rank measures, all exchange the facts, all judge them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from fgpt.checkpoint.size import kept_bytes
from fgpt.config.field_syntax import parse_blend
from fgpt.config.resolve import Resolved
from fgpt.data.card import CARD_NAME, load_card
from fgpt.distributed.agreements import gather_json, run_on_all
from fgpt.distributed.launch import World, hard_exit
from fgpt.doctor.check import Check, Grade, Places, merge
from fgpt.doctor.clock import judge_clocks, measure_clocks
from fgpt.doctor.devices import (
    device_facts,
    device_from_json,
    judge_device,
    judge_sharing,
    judge_speeds,
    measure_speeds,
)
from fgpt.doctor.disk import free_bytes, judge_free_disk, judge_shared, probe_shared
from fgpt.doctor.groups import best_of, judge_groups, measure_groups
from fgpt.doctor.host import HostFacts, host_facts, judge_host, node_names
from fgpt.doctor.links import judge_links, measure_links
from fgpt.doctor.software import (
    code_hash,
    judge_agreement,
    judge_version_agreement,
    judge_versions,
    supported_versions,
    versions,
)
from fgpt.errors import TrainingError
from fgpt.parallel.topology import Grid

STAGE_LIMIT_S = 120.0
"""Time for one measurement; after it a rank names the measurement and exits."""
TRIES = 3
"""A speed that looks slow is measured again, at most so many times in all, and the best counts:
another process may have had the cores for a moment."""
NOT_PREPARED = "not prepared"

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """What is examined beside the machines."""

    grid: Grid
    """The layout whose groups are measured."""
    run_dir: Path
    """Where a run would write."""
    data: str
    """The data sets, as `data.path`."""
    resolved: Resolved | None = None
    """The configuration of a run; None: none is given."""
    port: int | None = None
    """The port at which a run would meet, which nothing uses yet; None: that of this group."""


def examine(world: World, device: torch.device, subject: Subject) -> list[Check]:
    """Run every check; all ranks call this, and get the same findings.

    A measurement that takes longer than STAGE_LIMIT_S ends this process with a line that names it.
    """
    # 1. what each rank knows without measuring
    with _limited(world, "the exchange of facts"):
        facts = gather_json(run_on_all(lambda: _facts(world, device, subject), device), device)
    hosts = [HostFacts(**each["host"]) for each in facts]
    devices = [device_from_json(each["device"]) for each in facts]
    worlds = [World(**each["world"]) for each in facts]
    places = Places(node_names(hosts))
    supported = supported_versions()
    checks = merge([judge_versions(each["versions"], supported) for each in facts], places)
    checks += _judge_agreements(facts, places)
    checks += merge([judge_device(each) for each in devices], places)
    checks += judge_sharing(devices, places)
    on_hosts = zip(hosts, worlds, strict=True)
    checks += merge([judge_host(host, w, device.type) for host, w in on_hosts], places)
    # 2. clocks, disk, port
    with _limited(world, "the comparison of clocks"):
        checks += judge_clocks(measure_clocks(device), places)
    with _limited(world, "the run directory"):
        checks += _examine_disk(world, device, subject, places)
    port = judge_port(subject.port, os.environ) if world.is_rank0 else None
    checks += [Check(*each) for each in gather_json(port, device)[:1] if each]
    # 3. speeds
    with _limited(world, "the speed of the devices"):
        checks += _measure(
            lambda: gather_json(measure_speeds(device), device),
            faster_of,
            lambda speeds: judge_speeds(speeds, devices, places),
        )
    with _limited(world, "collectives"):
        limit = timedelta(seconds=STAGE_LIMIT_S)
        checks += _measure(
            lambda: measure_groups(subject.grid, world, device, limit),
            best_of,
            lambda speeds: judge_groups(speeds, places),
        )
    with _limited(world, "the network between nodes"):
        checks += judge_links(measure_links(world, device, places), places)
    return checks


def _facts(world: World, device: torch.device, subject: Subject) -> dict[str, Any]:
    """Everything that this rank knows without measuring, as JSON values."""
    return {
        "world": asdict(world),
        "host": asdict(host_facts(device.type)),
        "device": asdict(device_facts(device)),
        "versions": versions(),
        "code": code_hash(),
        "data": data_identity(subject.data),
        "configuration": subject.resolved and subject.resolved.fingerprint(),
    }


def data_identity(text: str) -> str:
    """What the cards of the data sets of `data.path` say; NOT_PREPARED if one has none.

    Raises DataError.
    """
    folders = [Path(part.path) for part in parse_blend(text)]
    if not all((folder / CARD_NAME).exists() for folder in folders):
        return NOT_PREPARED
    return " ".join(load_card(folder).fingerprint() for folder in folders)


def _judge_agreements(facts: Sequence[Mapping[str, Any]], places: Places) -> list[Check]:
    checks = judge_version_agreement([each["versions"] for each in facts], places)
    same_files = "give every node the same files"
    for what, key in (
        ("FGPT's code", "code"),
        ("data", "data"),
        ("configuration", "configuration"),
    ):
        check = judge_agreement(what, [each[key] for each in facts], same_files, places)
        if key == "data" and check.grade == "ok" and facts[0]["data"] == NOT_PREPARED:
            check = replace(check, value="not prepared yet; a run prepares the default data set")
        if key != "configuration" or facts[0][key] is not None:
            checks.append(check)
    return checks


def _examine_disk(
    world: World, device: torch.device, subject: Subject, places: Places
) -> list[Check]:
    """Free space, writing, and whether the nodes share the directory."""
    path = subject.run_dir
    needed = None if subject.resolved is None else kept_bytes(subject.resolved)
    try:
        free = run_on_all(lambda: free_bytes(path), device)
        seen = probe_shared(path, world, device)
    except TrainingError as error:
        remedy = "name a --run_dir that can be made and written"
        return [Check("error", "run directory", str(error), remedy)]
    own = judge_free_disk(path, free, needed)
    checks = [[Check(**each)] for each in gather_json(asdict(own), device)]
    return [*merge(checks, places), judge_shared(path, seen, places)]


def judge_port(port: int | None, environ: Mapping[str, str]) -> tuple[Grade, str, str, str]:
    """A check of the port at which ranks meet, as its fields."""
    if port is None:
        where = ":".join(environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        return "ok", "port", f"the ranks met at {where}", ""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            s.bind(("", port))
        except OSError as error:
            value = f"{port} cannot be bound: {error.strerror}"
            return "warning", "port", value, "name a free one: --master_port, or MASTER_PORT"
    return "ok", "port", f"{port} is free", ""


def _measure(
    measure: Callable[[], T], better_of: Callable[[T, T], T], judge: Callable[[T], list[Check]]
) -> list[Check]:
    """Judge a measurement, repeated while something looks slow; the same on all ranks."""
    result = measure()
    for _ in range(TRIES - 1):
        if all(check.grade == "ok" for check in judge(result)):
            break
        result = better_of(result, measure())
    return judge(result)


def faster_of(
    first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]
) -> list[Mapping[str, float]]:
    """The better value of two measurements of each rank."""
    both = zip(first, second, strict=True)
    return [{name: max(a[name], b[name]) for name in a} for a, b in both]


@contextlib.contextmanager
def _limited(world: World, what: str) -> Iterator[None]:
    """Exit with 1 if the context takes longer than STAGE_LIMIT_S."""
    text = f"{what}: not done after {STAGE_LIMIT_S:g} s on {socket.gethostname()}; a rank that"
    text += " prints no such line hangs, or cannot be reached"
    timer = threading.Timer(STAGE_LIMIT_S, hard_exit, (world.rank, text, TrainingError.exit_code))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
