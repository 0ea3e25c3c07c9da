"""What checkpoints contain, and an engine to save without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgpt.checkpoint.manager import Checkpoints
from fgpt.checkpoint.manifest import SaveInfo, Start, check_file, check_names, read_manifest
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.config.schema import CheckpointConfig
from fgpt.distributed.launch import World
from fgpt.engine.base import Engine
from fgpt.engine.state import WEIGHT, Fragment, Progress, Shard, StateTensor, Values

CPU = torch.device("cpu")


def state_of(checkpoint: Path) -> dict[tuple[str, str], Tensor]:
    """(logical name, state) -> the full tensor."""
    manifest = read_manifest(checkpoint)
    reader = CheckpointReader(checkpoint, manifest)
    return {
        (name, state): reader.read(name, state)
        for name, record in manifest.tensors.items()
        for state in record.states
    }


def assert_same_tensors(mine: Path, other: Path) -> None:
    """All weights and states are equal bit for bit, and the counters."""
    a, b = state_of(mine), state_of(other)
    assert a.keys() == b.keys() and a
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype and torch.equal(tensor, b[key]), key
    assert read_manifest(mine).progress == read_manifest(other).progress


def assert_same_state(mine: Path, other: Path) -> None:
    """As `assert_same_tensors`, and the data position."""
    assert_same_tensors(mine, other)
    m, n = read_manifest(mine), read_manifest(other)
    assert (m.samples_seen, m.tokens_seen) == (n.samples_seen, n.tokens_seen)


def assert_intact(checkpoint: Path) -> None:
    """Every file is what the manifest says, and no tensor is incomplete."""
    manifest = read_manifest(checkpoint)
    check_names(checkpoint, manifest.files)
    for file in manifest.files:
        check_file(checkpoint, file)
    CheckpointReader(checkpoint, manifest)


def info(**more: Any) -> SaveInfo:
    """What a checkpoint says beside its tensors."""
    fixed: dict[str, Any] = {"samples_seen": 0, "tokens_seen": 0, "identity": {}, "config": {}}
    return SaveInfo(**fixed | {"optimizer": "AdamW", "history": (Start(0, 0, {}),)} | more)


class FakeEngine:
    """Has one weight; `while_saving` is called when it is read."""

    def __init__(
        self,
        step: int,
        while_saving: Callable[[], None] = lambda: None,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
    ):
        self.step, self.while_saving, self.weights = step, while_saving, weights

    def progress(self) -> Progress:
        """At `step`, no step was skipped."""
        return Progress(self.step)

    @contextmanager
    def saving(self) -> Iterator[Sequence[StateTensor]]:
        """One tensor, without states."""
        self.while_saving()
        n = len(self.weights)
        fragment = Fragment(Shard("w", (n,), (0,), (n,)), 0, n, 0)
        values = Values(torch.tensor(self.weights))
        yield [StateTensor(WEIGHT, torch.float32, [fragment], lambda: nullcontext(values))]


def save_engine(engine: Engine, world: World, root: Path) -> Path:
    """Save an engine's state into `root`; returns the checkpoint. All ranks call this."""
    return Checkpoints(root, world, CPU, CheckpointConfig()).save(engine, info())


def load_engine(engine: Engine, world: World, checkpoint: Path) -> None:
    """Load a checkpoint with all of its states. All ranks call this."""
    checkpoints = Checkpoints(checkpoint.parent, world, CPU, CheckpointConfig())
    point = checkpoints.find(checkpoint)
    assert point is not None
    checkpoints.load(engine, point, point.manifest.states)
