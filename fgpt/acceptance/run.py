"""Runs each check in a separate process, so that a hang or a crash ends only that check."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fgpt.acceptance.check import CHECKS, NEEDS_GPU, Check
from fgpt.acceptance.report import append, passed_before, start
from fgpt.errors import LaunchError, UserError
from fgpt.utils.keys import did_you_mean

REPORT = Path("runs/gpu-check/report.jsonl")
PACKAGE = "fgpt.acceptance"
"""Where the modules of the checks' functions are."""
SETUP_LIMIT_S = 120.0
CPU_FACTOR = 3
"""How much longer a check may take on a CPU, which may have other work to do."""
SHORTEST_S = 20.0
"""Seconds that a check needs at least: most of them are imports."""
TIME_UP = "not run: the time is up: the same command goes on with what is missing"


def run_gpu_check(
    out: Path = REPORT,
    *,
    device: Literal["cuda", "cpu"] = "cuda",
    only: Sequence[str] = (),
    again: bool = False,
    minutes: float = 10.0,
    show: Callable[[str], None] = print,
    checks: Sequence[Check] = CHECKS,
) -> int:
    """Run all checks or `only` these, append their lines to `out`, and return 1 if one failed.

    A check that has passed before is not repeated, unless `again`, if the report is of the same
    commit, GPU and versions. After `minutes` the rest is left to the next call, which returns 1,
    too. `show` gets a line per check. Raises UserError for an unknown check, LaunchError without
    the device.
    """
    named = [check.name for check in checks]
    for name in only:
        if name not in named:
            near = did_you_mean(name, named)
            raise UserError(f"--only {name}: unknown check{near}; one of {', '.join(named)}")
    began = time.monotonic()
    folder = out.parent / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # 1. what is checked, and what of it has passed before
    header = _setup(folder, device)
    earlier = passed_before(out, header)
    if earlier is None:
        start(out, header)
    kept = {} if again or earlier is None else earlier
    show(f"{header['hardware']}, {device}: {len(checks)} checks, report in {out}")
    # 2. the checks
    failed = missing = 0
    for check in checks:
        if check.name in kept or (only and check.name not in only):
            continue
        left_s = 60 * minutes - (time.monotonic() - began)
        if device == "cpu" and not check.cpu_stand_in:
            line = _not_run(NEEDS_GPU)
        elif left_s < SHORTEST_S:
            line = _not_run(TIME_UP)
        else:
            line = _run(check, folder, device, left_s)
        missing += line["not_run"].get("all") == TIME_UP
        line = {"check": check.name, "state": line.pop("state"), "device": device, **line}
        append(out, line)
        failed += line["state"] == "failed"
        show(_summary(line))
    done = len([name for name in kept if name in named])
    again_text = f", {done} passed before" if done else ""
    show(f"{failed} failed, {missing} without time{again_text}; {time.monotonic() - began:.0f} s")
    return int(failed + missing > 0)


def _setup(folder: Path, device: str) -> dict[str, Any]:
    """Return the report's header; prepares the data of the training checks. Raises LaunchError."""
    check = Check("setup", "setup:describe_and_prepare", SETUP_LIMIT_S, "")
    line = _run(check, folder, device, left_s=math.inf)
    if line["state"] != "passed":
        raise LaunchError(f"{line['error']}; see {folder / 'setup.log'}")
    header: dict[str, Any] = json.loads((folder / "setup" / "header.json").read_text())
    return header


def _run(check: Check, folder: Path, device: str, left_s: float) -> dict[str, Any]:
    """Run a check's process; return its line without name and device.

    If it ends because `left_s` is over, before its own limit, it counts as not run.
    """
    result, log = folder / f"{check.name}.json", folder / f"{check.name}.log"
    environ = {**os.environ, "DS_ACCELERATOR": device}
    if device == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    limit_s = check.limit_s * (CPU_FACTOR if device == "cpu" else 1)
    t0 = time.monotonic()
    arguments = [
        f"{PACKAGE}.{check.function}",
        device,
        str(folder / check.name),
        str(folder / "data"),
        str(result),
    ]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fgpt.acceptance.process", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # so that its descendants end with it
        )
        try:
            code = process.wait(min(limit_s, left_s))
            reason = f"the process ended with {_ending(code)}" if code else ""
        except subprocess.TimeoutExpired:
            if left_s < limit_s:
                return _not_run(TIME_UP)
            reason = f"still ran after {limit_s:g} s"
        finally:
            _end_session(process)
    seconds = round(time.monotonic() - t0, 1)
    line = json.loads(result.read_text()) if not reason and result.exists() else None
    if line is None:
        reason = reason or "the process left no result"
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]
        line = {"ok": False, "figures": {}, "not_run": {}, "error": f"{reason}: {last}; log: {log}"}
    state = "passed" if line["ok"] else "failed"
    return {"state": state, "ok": line["ok"], "seconds": seconds, **line}


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a check's process and everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended
    process.wait()


def _not_run(reason: str) -> dict[str, Any]:
    return {
        "state": "not run",
        "ok": None,
        "seconds": 0.0,
        "figures": {},
        "not_run": {"all": reason},
        "error": None,
    }


def _summary(line: dict[str, Any]) -> str:
    """One line for the console: the first figure of a check that passed, the error of others."""
    text = f"  {line['state']:<8} {line['check']:<16} {line['seconds']:6.1f} s"
    if line["error"]:
        return f"{text}  {line['error']}"
    if line["state"] == "not run":
        return f"{text}  {line['not_run']['all']}"
    parts = [f"{len(line['figures'])} figures"]
    if line["not_run"]:
        parts.append(f"{len(line['not_run'])} parts not run here")
    return f"{text}  {', '.join(parts)}"
