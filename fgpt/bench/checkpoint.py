"""Saving and loading: FGPT's checkpoints against DeepSpeed's own, of the same engine.

A round takes each measurement once, in turn, so that a disturbance of the machine hits all of them.
A save is timed right after another of its kind, which is not: a virtual machine may give free
memory back to its host, and DeepSpeed's large writes, which need it again, took three to six times
as long where they came later. FGPT's smaller writes did not: the comparison favours it least.

    save            `Checkpoints.save`, hashed and synced to disk
    stall           how long training waits for a background save: the copy, and the commit
    lost            the stall, and what the steps take longer while the file is written
    deepspeed save  `engine.save_checkpoint`; then also the fsync of its files, which it leaves out
    load            verification of every file, which is also measured alone, and loading
    deepspeed load  `engine.load_checkpoint`
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fgpt.checkpoint.identity import run_layout
from fgpt.checkpoint.manager import Checkpoints, ResumePoint
from fgpt.checkpoint.manifest import SaveInfo, Start
from fgpt.config.resolve import Resolved
from fgpt.config.schema import CheckpointConfig
from fgpt.data.loader import MicroBatch
from fgpt.distributed.agreements import any_rank, run_on_rank0
from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from fgpt.engine.deepspeed.zero_engine import ZeroEngine
from fgpt.parity.trace import micro_batches

WARMUP_STEPS = 2
STEPS = 3
"""Steps whose median is the time of a step."""
Round = dict[str, float]
"""Name of a measurement -> seconds or bytes."""


def measure_checkpoints(
    resolved: Resolved, world: World, device: torch.device, folder: Path, n_rounds: int
) -> Iterator[Round]:
    """Yield each round's measurements. All ranks call this; `folder` is theirs, and stays empty."""
    engine = build_engine(resolved, world, device)
    assert isinstance(engine, ZeroEngine)
    bench = _Bench(engine, resolved, world, device, folder)
    bench.steps(WARMUP_STEPS)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints while it loads
        bench.round()  # warms up: host memory of copies, optimizer states
        for _ in range(n_rounds):
            yield bench.round()
    engine.close()


class _Bench:
    """The measurements of one engine."""

    def __init__(
        self,
        engine: ZeroEngine,
        resolved: Resolved,
        world: World,
        device: torch.device,
        folder: Path,
    ):
        self.engine, self.resolved, self.world, self.device = engine, resolved, world, device
        self.folder = folder
        self.info = SaveInfo(
            samples_seen=0,
            tokens_seen=0,
            identity={},
            config=resolved.to_json(),
            optimizer="AdamW",
            history=(Start(0, 0, run_layout(resolved)),),
        )
        self.checkpoints = Checkpoints(folder / "fgpt", world, device, CheckpointConfig())

    def round(self) -> Round:
        """Take each measurement once."""
        found: Round = {"step_s": statistics.median(self.steps(STEPS))}
        # 1. while training waits
        self._remove(self.checkpoints.save(self.engine, self.info))
        found["save_s"] = self._timed(lambda: self.checkpoints.save(self.engine, self.info))
        path = self.checkpoints.directory.path(self.engine.step)
        found["bytes"] = _size(path)
        found |= self._load(path)
        self._remove(path)
        # 2. in the background
        self._background(found["step_s"])
        found |= self._background(found["step_s"])
        # 3. DeepSpeed's
        root = self.folder / "deepspeed"
        deepspeed = self.engine.deepspeed
        deepspeed.save_checkpoint(str(root), tag="saved")
        self._remove(root)
        save = self._timed(lambda: deepspeed.save_checkpoint(str(root), tag="saved"))
        found["deepspeed_save_s"] = save
        synced = self._timed(lambda: _sync(root / "saved", self.world))
        found["deepspeed_durable_s"] = save + synced
        found["deepspeed_bytes"] = _size(root / "saved")
        found["deepspeed_load_s"] = self._timed(
            lambda: deepspeed.load_checkpoint(str(root), tag="saved")
        )
        self._remove(root)
        return found

    def _load(self, path: Path) -> Round:
        points: list[ResumePoint | None] = []
        verify = self._timed(lambda: points.append(self.checkpoints.find(path)))
        point = points[0]
        assert point is not None
        states = point.manifest.states
        load = self._timed(lambda: self.checkpoints.load(self.engine, point, states))
        return {"verify_s": verify, "load_s": verify + load}

    def steps(self, n: int) -> list[float]:
        """Train; returns the seconds of each step."""
        times = []
        for _ in range(n):
            batches = micro_batches(self.resolved, self.world.rank, self.engine.step)
            times.append(self._timed(partial(self._step, batches)))
        return times

    def _step(self, batches: list[MicroBatch]) -> None:
        self.engine.train_batch(batches).result()

    def _background(self, step_s: float) -> Round:
        """`step_s`: seconds of a step without a save."""
        begin = self._timed(lambda: self.checkpoints.begin(self.engine, self.info, background=True))
        steps = []
        while any_rank(not self.checkpoints.is_written(), self.device):
            steps += self.steps(1)
        finish = self._timed(self.checkpoints.finish)
        self._remove(self.checkpoints.directory.complete()[0])
        during = statistics.median(steps) if steps else float("nan")
        return {
            "copy_s": begin,
            "commit_s": finish,
            "stall_s": begin + finish,
            "step_during_s": during,
            "lost_s": begin + finish + sum(steps) - len(steps) * step_s,
        }

    def _remove(self, path: Path) -> None:
        run_on_rank0(lambda: shutil.rmtree(path), self.device)

    def _timed(self, action: Callable[[], Any]) -> float:
        """Seconds from all ranks ready to all ranks done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier()
        start = time.perf_counter()
        action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier()
        return time.perf_counter() - start


def _size(path: Path) -> int:
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def _sync(path: Path, world: World) -> None:
    """Sync this rank's share of the files, as FGPT's ranks do with theirs, and the directory."""
    entries = [*sorted(path.iterdir()), path]
    for entry in entries[world.rank :: world.size]:
        descriptor = os.open(entry, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def summary(rounds: list[Round]) -> dict[str, Any]:
    """Medians with lowest and highest, and the ratios that matter, taken round by round."""
    ratios: dict[str, Callable[[Round], float]] = {
        "bytes / deepspeed": lambda r: r["bytes"] / r["deepspeed_bytes"],
        "save / deepspeed": lambda r: r["save_s"] / r["deepspeed_save_s"],
        "save / deepspeed durable": lambda r: r["save_s"] / r["deepspeed_durable_s"],
        "stall / deepspeed": lambda r: r["stall_s"] / r["deepspeed_save_s"],
        "stall / deepspeed durable": lambda r: r["stall_s"] / r["deepspeed_durable_s"],
        "lost / deepspeed": lambda r: r["lost_s"] / r["deepspeed_save_s"],
        "lost / deepspeed durable": lambda r: r["lost_s"] / r["deepspeed_durable_s"],
        "step during / step": lambda r: r["step_during_s"] / r["step_s"],
        "load / deepspeed": lambda r: r["load_s"] / r["deepspeed_load_s"],
    }
    columns: dict[str, list[float]] = {name: [r[name] for r in rounds] for name in rounds[0]}
    columns |= {name: [ratio(r) for r in rounds] for name, ratio in ratios.items()}
    return {
        name: [statistics.median(values), min(values), max(values)]
        for name, values in columns.items()
    }
