"""A stand-in for a launched run, for tests of the supervisor: fake_run.py RUN_DIR PLAN FLAGS...

It keeps the files that a run keeps (config.json, metrics.jsonl, checkpoints, failures.jsonl), and
fails as PLAN says, a JSON object:

    steps, every    steps of the run, and between two checkpoints
    bad_samples     a batch of four samples with one of these fails, and is recorded
    starts          for each start, {"at": step, "do": what}; or {"do": what} before it takes the
                    run directory. What: exit N, kill, orphan (leave one and fail), wait or hold
                    (for SIGTERM: to end, or not to)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fgpt.config.field_syntax import parse_ranges
from fgpt.train.failure_record import FailureRecord, append_failure

STEP_S = 0.01
BATCH = 4


def main(run_dir: Path, plan: dict[str, Any], flags: list[str]) -> int:
    starts = run_dir.with_name("starts.jsonl")
    number = len(starts.read_text().splitlines()) if starts.exists() else 0
    with starts.open("a") as file:
        file.write(json.dumps(flags) + "\n")
    events = plan.get("starts", [])
    event = events[number] if number < len(events) else {}
    if event and "at" not in event:
        act(event["do"], run_dir)
    # 1. take the directory, and go on from the newest checkpoint
    checkpoints, metrics = run_dir / "checkpoints", run_dir / "metrics.jsonl"
    checkpoints.mkdir(parents=True, exist_ok=True)
    config = run_dir / "config.json.tmp"
    config.write_text(json.dumps({"run": {"train": {"steps": plan["steps"]}}}))
    config.replace(run_dir / "config.json")
    step = max((int(path.name[5:]) for path in checkpoints.iterdir()), default=0)
    lines = metrics.read_text().splitlines()[:step] if metrics.exists() else []
    metrics.write_text("".join(f"{line}\n" for line in lines))
    # 2. train
    skip = [flag.partition("=")[2] for flag in flags if "data.skip_samples" in flag]
    skipped = parse_ranges(skip[-1].partition("=")[2]) if skip else []
    read = [g for g in range(1000) if not any(first <= g <= last for first, last in skipped)]
    while step < plan["steps"]:
        batch = read[step * BATCH : (step + 1) * BATCH]
        if event.get("at") == step:
            act(event["do"], run_dir, step)
        if set(batch) & set(plan.get("bad_samples", [])):
            record(run_dir, step, 1, batch)
            return 1
        time.sleep(STEP_S)
        step += 1
        line = {"step": step, "time": time.time(), "loss": 2.0, "step_s": STEP_S, "skipped": False}
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if step % plan["every"] == 0 or step == plan["steps"]:
            (checkpoints / f"step_{step:08d}").mkdir(exist_ok=True)
    return 0


def act(what: str, run_dir: Path, step: int = 0) -> None:
    kind, _, value = what.partition(" ")
    if kind == "exit":
        sys.exit(int(value))
    if kind == "bad":  # input, under a launcher that reports 1
        record(run_dir, step, 2, None)
        sys.exit(1)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "orphan":
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        orphan = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        run_dir.with_name("orphan").write_text(str(orphan.pid))
        os._exit(1)
    signals = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    run_dir.with_name("ready").touch()
    while not signals or kind == "hold":
        time.sleep(0.01)
    time.sleep(0.5)  # a second one would come soon
    run_dir.with_name("signals").write_text(str(len(signals)))
    sys.exit(143)


def record(run_dir: Path, step: int, code: int, batch: list[int] | None) -> None:
    samples = None if batch is None else tuple(batch)
    append_failure(run_dir, FailureRecord(time.time(), 1, step, "data", "broken", code, samples))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]))
