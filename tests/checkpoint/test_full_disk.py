"""Full disk or missing directory: saves fail on all ranks alike, and training continues."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fgpt.checkpoint.manager import Checkpoints
from fgpt.config.schema import CheckpointConfig
from fgpt.distributed.launch import World
from fgpt.errors import TrainingError
from tests.checkpoint.saved import FakeEngine, assert_intact, assert_same_state, info
from tests.ranks import run_ranks, start_ranks, start_trainer
from tests.tiny import EVERY, STEPS, Outcome, Tiny, train_all

pytestmark = pytest.mark.dist

SHARD_BYTES = 100_000
"""Less than any shard of the tiny model, more than all other files."""
LAYER_BYTES = 20_000
"""Less than a layer of a stage, halved between two tensor ranks."""
NOTICE_S = 30.0  # under 10 s on an idle machine


def run_with_limit(
    world: World,
    flags: list[str],
    rank: int,
    from_step: int,
    to_step: int,
    limit: int = SHARD_BYTES,
) -> tuple[Outcome, list[float]]:
    """Train; files of `rank` cannot grow beyond `limit` bytes at steps [from_step, to_step).

    Python ignores SIGXFSZ, so that writing raises OSError, as on a full disk. Also returns how long
    each save took, in seconds.
    """
    begin, finish, took_s = Checkpoints.begin, Checkpoints.finish, [0.0]

    def limited(self: Checkpoints, engine: Any, *args: Any, **more: Any) -> None:
        full = world.rank == rank and from_step <= engine.step < to_step
        soft = limit if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
        begin(self, engine, *args, **more)

    def timed(self: Checkpoints) -> Path | None:
        t0 = time.monotonic()
        try:
            return finish(self)
        finally:
            took_s.append(time.monotonic() - t0)

    with mock.patch.multiple(Checkpoints, begin=limited, finish=timed):
        return train_all(world, [flags])[0], took_s


@pytest.mark.parametrize(
    ("rank", "stage", "background"),
    [(0, 0, True), (1, 0, False), (0, 2, False), (1, 2, True), (0, 3, True), (1, 3, False)],
)
def test_one_full_save_does_not_end_the_run(
    tiny: Tiny, rank: int, stage: int, background: bool
) -> None:
    ds = tiny.ds(zero_optimization={"stage": stage})
    flags = tiny.flags("run", f"--set=checkpoint.async={str(background).lower()}", ds=ds)
    results = run_ranks(run_with_limit, 2, flags, rank, 4, 5)
    (leader, leader_s), (other, other_s) = results
    assert leader.code == other.code == 0, leader.error
    assert max(leader_s + other_s) < NOTICE_S
    assert leader.output.count("not saved") == 1
    assert "step 4: checkpoint not saved" in leader.output and "File too large" in leader.output
    assert "step_00000002 is unchanged; training continues" in leader.output
    assert ("rank 1" in leader.output) == (rank == 1)
    assert tiny.checkpoints("run") == ["latest", "step_00000002", "step_00000006"]
    assert_intact(tiny.checkpoint("run", 2))
    assert_intact(tiny.checkpoint("run", STEPS))
    assert [step for step, _ in tiny.losses("run")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("grid", "ranks", "rank", "limit"),
    [
        (["--pp=2"], 2, 1, SHARD_BYTES),
        (["--tp=2", "--pp=2"], 4, 3, LAYER_BYTES),
        (["--tp=2"], 2, 1, SHARD_BYTES),
    ],
)
def test_one_full_save_of_a_grid(
    tiny: Tiny, grid: list[str], ranks: int, rank: int, limit: int
) -> None:
    flags = tiny.flags("run", *grid, ds=tiny.ds(zero_optimization={"stage": 1}))
    results = run_ranks(run_with_limit, ranks, flags, rank, 4, 5, limit)
    leader = results[0][0]
    assert [outcome.code for outcome, _ in results] == [0] * ranks, leader.error
    assert max(took_s for _, each in results for took_s in each) < NOTICE_S
    assert leader.output.count("not saved") == 1
    assert f"step 4: checkpoint not saved: rank {rank}: File too large" in leader.output
    assert tiny.checkpoints("run") == ["latest", "step_00000002", "step_00000006"]
    assert_intact(tiny.checkpoint("run", 2))
    assert_intact(tiny.checkpoint("run", STEPS))


def test_three_failed_saves_end_the_run(tiny: Tiny) -> None:
    flags = tiny.flags("run", "--steps", 20)
    (leader, _), (other, _) = run_ranks(run_with_limit, 2, flags, 1, 4, 100)
    assert leader.code == other.code == 1
    assert "3 saves failed in a row" in leader.error and "step 8" in leader.error
    assert "\n" not in leader.error
    assert tiny.checkpoints("run") == ["latest", "step_00000002"]
    assert_intact(tiny.checkpoint("run", 2))


def test_a_failed_last_save_is_not_success(tiny: Tiny) -> None:
    results = run_ranks(run_with_limit, 2, tiny.flags("run", "--steps", 3), 0, 3, 100)
    assert [outcome.code for outcome, _ in results] == [1, 1]
    error = results[0][0].error
    assert "step 3: checkpoint not saved" in error and "step_00000002 is unchanged" in error


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("free", "says"), [(1000, "0.0 MiB are free"), (2**20 + 1, "1.0 MiB")])
def test_too_little_space(
    free: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers differ, however small the lack is; what is kept is named only where it exists."""
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    checkpoints = Checkpoints(tmp_path, World(), torch.device("cpu"), CheckpointConfig())
    engine: Any = FakeEngine(4)
    if free > 2**20:
        (tmp_path / "step_00000002").mkdir()
        (tmp_path / "step_00000002" / "file").write_bytes(b"12")
    with pytest.raises(TrainingError) as error:
        checkpoints.save(engine, info())
    text = str(error.value)
    assert f"{says}, about 1 MiB too few" in text or f"{says} are free, about 1 MiB too few" in text
    assert text.endswith("is unchanged" if free > 2**20 else "no earlier checkpoint exists")


@pytest.mark.parametrize("point", ["after_shards:0", "after_shards:1", "before_rename:0"])
def test_no_space_at_every_point(tiny: Tiny, point: str) -> None:
    with start_trainer(2, *tiny.flags("run"), env={"FGPT_FAULT": f"{point}:4:full"}) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        said = ranks.output(0)
    assert said.count("step 4: checkpoint not saved") == 1 and "No space left on device" in said
    assert tiny.checkpoints("run") == ["latest", "step_00000002", "step_00000006"]


def test_after_the_rename_nothing_is_a_failure(tiny: Tiny) -> None:
    """Three such errors in a row would end a healthy run; a retry would delete the checkpoint."""
    fault = {"FGPT_FAULT": "before_latest:0:4:full"}
    with start_trainer(2, *tiny.flags("run"), env=fault) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        said = ranks.output(0)
    assert "not saved" not in said
    assert "step_00000004 is saved; " in said and "No space left on device" in said
    assert tiny.checkpoints("run") == ["latest", "step_00000004", "step_00000006"]
    assert (tiny.path("run") / "checkpoints" / "latest").read_text() == "step_00000006\n"


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """Returns a function that calls mount(8) with these arguments, the last one a directory."""
    mounted: list[str] = []

    def call(*arguments: object) -> None:
        words = [*map(str, arguments)]
        if subprocess.run(["mount", *words], stderr=subprocess.DEVNULL).returncode:
            pytest.skip("mounting a file system needs root")
        mounted.append(words[-1])

    yield call
    for folder in dict.fromkeys(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


def train_on_a_filling_disk(world: World, flags: list[str], disk: Path) -> int:
    """Train with the console on the disk too; it is full while step 4 is saved, until step 6 is."""
    from fgpt.checkpoint.directory import CheckpointDirectory
    from fgpt.cli.train import main

    create, filler = CheckpointDirectory.create_partial, disk / "filler"

    def create_partial(self: CheckpointDirectory, step: int) -> None:
        if step == 6:
            filler.unlink()
        create(self, step)
        if step == 4:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                for size in (2**16, 1):
                    while file.write(bytes(size)) == size:
                        pass

    console = os.open(disk / f"console{world.rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(console, 1)
    os.dup2(console, 2)
    with mock.patch.object(CheckpointDirectory, "create_partial", create_partial):
        return main(flags)


@pytest.mark.parametrize("background", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_disk_that_is_really_full(
    tiny: Tiny, mount: Callable[..., None], background: str
) -> None:
    """Checkpoint, metrics and console are on it: a save is lost, and nothing else."""
    disk = tiny.path("disk")
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=12m", "tmpfs", disk)
    options = (f"--set=checkpoint.async={background}", "--set=train.log_every=1")
    flags = tiny.flags("disk/run", *options)
    with start_ranks(train_on_a_filling_disk, 2, flags, disk, join=False) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        assert ranks.results() == [0, 0], (disk / "console0").read_text()
    assert tiny.checkpoints("disk/run") == ["latest", "step_00000002", "step_00000006"]
    assert_intact(tiny.checkpoint("disk/run", STEPS))
    assert run_ranks(train_all, 2, [tiny.flags("elsewhere")])[0][0].code == 0
    assert tiny.losses("disk/run") == tiny.losses("elsewhere")
    assert_same_state(tiny.checkpoint("disk/run", STEPS), tiny.checkpoint("elsewhere", STEPS))


def test_a_read_only_directory(tiny: Tiny, mount: Callable[..., None]) -> None:
    """Is an error before the first step, whether it is the run's or that of its checkpoints."""
    assert run_ranks(train_all, 2, [tiny.flags("run", "--steps", 2)])[0][0].code == 0
    whole, checkpoints = tiny.path("whole"), tiny.path("run") / "checkpoints"
    whole.mkdir()
    mount("-t", "tmpfs", "-o", "ro", "tmpfs", whole)
    mount("--bind", checkpoints, checkpoints)
    mount("-o", "remount,ro,bind", checkpoints)
    runs = [tiny.flags("whole"), tiny.flags("run", "--resume", "auto")]
    for outcomes in run_ranks(train_all, 2, runs):
        assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
        for outcome, place in zip(outcomes, (whole, checkpoints), strict=True):
            assert f"{place}" in outcome.error and "Read-only file system" in outcome.error
    assert len(tiny.losses("run")) == 2


def metrics_on_a_full_disk(world: World, flags: list[str]) -> Outcome:
    """Train; writes to metrics.jsonl fail, or stop half-way, until the last two steps."""
    from fgpt.train import metrics

    class Full:
        """A file on a full disk."""

        def __init__(self, file: Any):
            self.file, self.name, self.calls = file, file.name, 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            if self.calls % 2:
                raise OSError(28, "No space left on device")
            return int(self.file.write(data[: len(data) // 2 + 1]))

        def close(self) -> None:
            self.file.close()

    real = metrics.Metrics.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        self.file = Full(self.file)

    with mock.patch.object(metrics.Metrics, "__init__", init):
        return train_all(world, [flags])[0]


def test_metrics_wait_for_room(tiny: Tiny) -> None:
    flags = tiny.flags("run", "--set=train.log_every=1")
    outcome = run_ranks(metrics_on_a_full_disk, 2, flags)[0]
    assert outcome.code == 0, outcome.error
    assert "No space left on device" in outcome.output
    lines = (tiny.path("run") / "metrics.jsonl").read_bytes().split(b"\n")
    steps = [json.loads(line)["step"] for line in lines[:-1]]
    assert steps[:4] == [0, 1, 2, 3]  # complete lines in order; the last may stay pending


def test_a_run_directory_that_cannot_be_made(tiny: Tiny) -> None:
    (tiny.folder / "file").touch()
    under_a_file = run_ranks(train_all, 2, [tiny.flags("file/run")])
    for outcome in under_a_file[0]:
        assert outcome.code == 2 and str(tiny.folder / "file") in outcome.error
        assert "\n" not in outcome.error


def test_latest_is_a_directory(tiny: Tiny) -> None:
    latest = tiny.path("run") / "checkpoints" / "latest"
    assert run_ranks(train_all, 2, [tiny.flags("run", "--steps", 2)])[0][0].code == 0
    latest.unlink()
    latest.mkdir()
    outcome = run_ranks(train_all, 2, [tiny.flags("run", "--resume", "auto")])[1][0]
    assert outcome.code == 2 and f"{latest}: is a directory" in outcome.error
    latest.rmdir()
    latest.symlink_to("/etc")
    outcome = run_ranks(train_all, 2, [tiny.flags("run", "--resume", "auto")])[1][0]
    assert outcome.code == 0 and latest.read_text() == "step_00000006\n"
    assert not latest.is_symlink()


def test_the_checkpoints_vanish_while_training(tiny: Tiny) -> None:
    outcome = run_ranks(run_and_remove, 2, tiny.flags("run"), tiny.path("run") / "checkpoints")
    assert [o.code for o in outcome] == [0, 0]
    assert tiny.checkpoints("run") == ["latest", "step_00000004", "step_00000006"]


def run_and_remove(world: World, flags: list[str], folder: Path) -> Outcome:
    """Train; remove the checkpoints after the save of step EVERY."""
    finish = Checkpoints.finish

    def finished(self: Checkpoints) -> Path | None:
        path = finish(self)
        if world.is_rank0 and path is not None and path.name == f"step_{EVERY:08d}":
            shutil.rmtree(folder)
        return path

    with mock.patch.object(Checkpoints, "finish", finished):
        # else the next save could have begun: its directory is inside
        return train_all(world, [[*flags, "--set=checkpoint.async=false"]])[0]
