"""The doctor's cheap checks, before the first step: all ranks the same, and room for the run.

Nothing is printed if all is well; `fgpt doctor` is the whole examination.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fgpt.checkpoint.size import checkpoint_bytes, kept_bytes
from fgpt.distributed.agreements import agreed, gather_json
from fgpt.distributed.launch import World
from fgpt.doctor.check import Check, Places, merge
from fgpt.doctor.clock import judge_clocks, measure_clocks
from fgpt.doctor.disk import free_bytes, judge_free_disk
from fgpt.doctor.host import HostFacts, host_facts, judge_open_files, judge_shm, node_names
from fgpt.doctor.software import (
    code_hash,
    judge_agreement,
    judge_version_agreement,
    versions,
)
from fgpt.engine.speed import lost_without_compiler
from fgpt.errors import LaunchError
from fgpt.train.startup import RunContext


def preflight(context: RunContext, resume: str) -> None:
    """Print what may cost the run later, a line each. All ranks call this.

    `resume`: as for `train.run.run`. Raises LaunchError, which names the ranks, unless all have the
    same configuration, code of FGPT, and versions of its libraries.
    """
    facts = gather_json(_facts(context), context.device)
    hosts = [HostFacts(**each["host"]) for each in facts]
    places = Places(node_names(hosts))
    for check in _judge_agreements(facts, places):
        if check.grade == "error":
            raise agreed(LaunchError(f"{check.what} differs: {check.value}; {check.remedy}"))
    kind = context.device.type
    checks = merge(
        [
            [judge_shm(host, world, kind), judge_open_files(host, world), *_lost(each)]
            for host, world, each in zip(hosts, _worlds(facts), facts, strict=True)
        ],
        places,
    )
    checks += judge_clocks(measure_clocks(context.device), places)
    checks += _free_disk(context, resume)
    for check in checks:
        if check.grade != "ok":
            context.print(str(check) if check.grade == "slow" else f"{check.grade}: {check}")


def _facts(context: RunContext) -> dict[str, Any]:
    """What this rank knows, as JSON values."""
    world = context.world
    return {
        "world": asdict(world),
        "host": asdict(host_facts(context.device.type)),
        "configuration": context.resolved.fingerprint(),
        "versions": versions(),
        # one rank per node reads the files
        "code": code_hash() if world.local_rank == 0 else None,
        "lost": lost_without_compiler(context.resolved),
    }


def _worlds(facts: Sequence[Mapping[str, Any]]) -> list[World]:
    return [World(**each["world"]) for each in facts]


def _judge_agreements(facts: Sequence[Mapping[str, Any]], places: Places) -> Iterator[Check]:
    remedy = "give every node the same files"
    for what, key in (("the configuration", "configuration"), ("FGPT's code", "code")):
        yield judge_agreement(what, [each[key] for each in facts], remedy, places)
    yield from judge_version_agreement([each["versions"] for each in facts], places)


def _lost(facts: Mapping[str, Any]) -> list[Check]:
    """The speed that a rank loses without a compiler."""
    return [Check("slow", "slow path", facts["lost"])] if facts["lost"] else []


def _free_disk(context: RunContext, resume: str) -> list[Check]:
    """Rank 0's disk, against the checkpoints that are still to be written."""
    resolved, path = context.resolved, context.path
    with contextlib.suppress(OSError, ValueError):  # `RunDir` says what is wrong with the path
        saved = 0 if resume == "none" else len(list((path / "checkpoints").glob("step_*")))
        needed = max(0, kept_bytes(resolved) - saved * checkpoint_bytes(resolved))
        return [judge_free_disk(path, free_bytes(path), needed)]
    return []
