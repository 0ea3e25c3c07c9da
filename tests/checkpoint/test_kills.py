"""kill -9 at every critical point, then the same command again."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fgpt.checkpoint.directory import NAME
from fgpt.checkpoint.manifest import read_manifest
from fgpt.distributed.launch import World
from tests.checkpoint.saved import assert_intact
from tests.ranks import Ranks, run_ranks, start_ranks, start_trainer, wait_until
from tests.tiny import STEPS, Tiny, train_all

pytestmark = pytest.mark.dist

NOTICE_S = 30.0  # under 10 s on an idle machine
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Layout:
    """A number of ranks and their flags."""

    ranks: int
    zero: int
    flags: tuple[str, ...] = ()

    def command(self, tiny: Tiny, *more: object) -> list[str]:
        """Flags of the trainer."""
        ds = tiny.ds(zero_optimization={"stage": self.zero}, gradient_accumulation_steps=2)
        return tiny.flags("run", *self.flags, *more, ds=ds)


DP2 = Layout(2, 2)
LAYOUTS = {
    "tp 2": Layout(2, 2, ("--tp=2",)),
    "tp 2, ZeRO-3": Layout(2, 3, ("--tp=2",)),
    "pp 2": Layout(2, 1, ("--pp=2",)),
    "cp 2": Layout(2, 1, ("--cp=2",)),
    "tp 2, pp 2": Layout(4, 1, ("--tp=2", "--pp=2")),
}


@pytest.fixture(scope="module")
def whole(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Tiny]:
    """Layout -> an uninterrupted run."""

    @cache
    def run(layout: Layout) -> Tiny:
        tiny = Tiny(tmp_path_factory.mktemp("undisturbed"), small_data)
        assert run_ranks(train_all, layout.ranks, [layout.command(tiny)])[0][0].code == 0
        return tiny

    return run


@pytest.fixture
def undisturbed(whole: Callable[[Layout], Tiny]) -> Tiny:
    """An uninterrupted run of DP2."""
    return whole(DP2)


def seals(run: Path) -> list[str]:
    """Return the hashes of the last checkpoint: weights and optimizer, bit for bit."""
    manifest = read_manifest(run / "checkpoints" / f"step_{STEPS:08d}")
    return [file.sha256 for file in manifest.files]


def go_on(tiny: Tiny, undisturbed: Tiny, possible: Sequence[int], layout: Layout = DP2) -> None:
    """The same command with --resume auto equals the uninterrupted run."""
    with start_trainer(layout.ranks, *layout.command(tiny, "--resume", "auto")) as again:
        assert again.wait() == [0] * layout.ranks, again.output()
        resumed = [f"at step {step}\n" in again.output(0) for step in possible if step]
        assert any(resumed) or 0 in possible, again.output()
    assert tiny.losses("run") == undisturbed.losses("run")
    assert seals(tiny.path("run")) == seals(undisturbed.path("run"))
    assert tiny.checkpoints("run") == undisturbed.checkpoints("run")


def others_leave(ranks: Ranks, dead: int) -> None:
    """After one rank is killed, the other prints one line and exits by itself."""
    wait_until(lambda: not ranks.processes[dead].is_alive(), 60, "the planned kill")
    t0 = time.monotonic()
    codes = ranks.wait()
    assert time.monotonic() - t0 < NOTICE_S
    assert codes[dead] in (KILLED, -signal.SIGXFSZ) and codes[1 - dead] == 1
    said = ranks.output(1 - dead)
    assert said.count("another rank is gone") == 1 and "Traceback" not in said, said


@pytest.mark.parametrize("point", ["forward", "step"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_dies_while_training(tiny: Tiny, undisturbed: Tiny, point: str, rank: int) -> None:
    # the step counter is 4 at the forward pass of step 5, and 5 after it
    step = 4 if point == "forward" else 5
    fault = {"FGPT_FAULT": f"{point}:{rank}:{step}:kill"}
    with start_trainer(2, *DP2.command(tiny), env=fault) as ranks:
        others_leave(ranks, rank)
        said = ranks.output(1 - rank)
        assert f"after step {step}:" in said and "newest checkpoint: /" in said
    go_on(tiny, undisturbed, [2, 4])  # that of step 4 may still be written


def _train_until_within_a_step(world: World, rank: int, moment: str, flags: list[str]) -> None:
    """`rank` is killed in its fifth step: in its backward pass, or between two of the optimizer's
    parameter groups.
    """
    import torch

    from fgpt.cli import train
    from fgpt.model.gpt import Block
    from fgpt.train import loop

    step = 0
    fault_point, forward, adam = loop.fault_point, Block.forward, torch.optim.AdamW.step

    def note(point: str, of_rank: int, done: int) -> None:
        nonlocal step
        step = done
        fault_point(point, of_rank, done)

    def die() -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(block: Any, *args: Any) -> Any:
        out = forward(block, *args)
        if out.requires_grad:
            out.register_hook(lambda gradient: die())
        return out

    def watched_adam(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = adam(self, *args, **kwargs)
        die()
        return result

    if world.rank == rank:
        loop.fault_point = note  # type: ignore[attr-defined]
        if moment == "backward":
            Block.forward = watched  # type: ignore[method-assign]
        else:
            torch.optim.AdamW.step = watched_adam  # type: ignore[method-assign]
    os._exit(train.main(flags))


@pytest.mark.parametrize(("moment", "rank"), [("backward", 0), ("optimizer", 1)])
def test_a_rank_dies_within_a_step(tiny: Tiny, undisturbed: Tiny, moment: str, rank: int) -> None:
    flags = DP2.command(tiny)
    with start_ranks(_train_until_within_a_step, 2, rank, moment, flags, join=False) as ranks:
        others_leave(ranks, rank)
        assert "after step 4:" in ranks.output(1 - rank)
    go_on(tiny, undisturbed, [2, 4])


POINTS = [
    *itertools.product(["before_shards", "after_shards", "before_manifest"], [0, 1], [[2]]),
    ("before_rename", 0, [2]),
    ("before_latest", 0, [4]),  # renamed: it is complete
]


@pytest.mark.parametrize(("point", "rank", "possible"), POINTS)
def test_all_ranks_die_while_saving(
    tiny: Tiny, undisturbed: Tiny, point: str, rank: int, possible: list[int]
) -> None:
    fault = {"FGPT_FAULT": f"{point}:{rank}:4:kill"}
    with start_trainer(2, *DP2.command(tiny), env=fault) as ranks:
        wait_until(lambda: not ranks.processes[rank].is_alive(), 60, "the planned kill")
    assert ("step_00000004.tmp" in tiny.checkpoints("run")) == (4 not in possible)
    go_on(tiny, undisturbed, possible)


LAYOUT_POINTS = [
    ("tp 2", "after_shards", 1, 2),
    ("tp 2, ZeRO-3", "before_shards", 1, 2),
    ("pp 2", "before_shards", 1, 2),
    ("pp 2", "before_rename", 0, 2),
    ("cp 2", "before_manifest", 1, 2),
    ("tp 2, pp 2", "after_shards", 2, 2),
    ("tp 2, pp 2", "before_latest", 0, 4),
]


@pytest.mark.parametrize(("name", "point", "rank", "kept"), LAYOUT_POINTS)
def test_all_ranks_of_a_layout_die_while_saving(
    tiny: Tiny, whole: Callable[[Layout], Tiny], name: str, point: str, rank: int, kept: int
) -> None:
    layout = LAYOUTS[name]
    fault = {"FGPT_FAULT": f"{point}:{rank}:4:kill"}
    with start_trainer(layout.ranks, *layout.command(tiny), env=fault) as ranks:
        wait_until(lambda: not ranks.processes[rank].is_alive(), 60, "the planned kill")
    go_on(tiny, whole(layout), [kept], layout)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_dies_in_the_middle_of_a_file(tiny: Tiny, undisturbed: Tiny, rank: int) -> None:
    with start_ranks(_train_until_file_of, 2, rank, DP2.command(tiny), join=False) as ranks:
        others_leave(ranks, rank)
    sizes = [p.stat().st_size for p in (tiny.path("run") / "checkpoints").glob("*.tmp/*")]
    assert FILE_BYTES in sizes
    go_on(tiny, undisturbed, [0])


FILE_BYTES = 100_000


def _train_until_file_of(world: World, rank: int, flags: list[str]) -> None:
    """The kernel kills `rank` as it writes byte FILE_BYTES of a file."""
    if world.rank == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # python makes an OSError of it
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    from fgpt.cli.train import main

    os._exit(main(flags))


def test_killed_again_and_again(tiny: Tiny, undisturbed: Tiny) -> None:
    for point in ("forward:0:1", "before_rename:0:2", "after_shards:1:4", "step:1:5"):
        fault = {"FGPT_FAULT": f"{point}:kill"}
        with start_trainer(2, *DP2.command(tiny, "--resume", "auto"), env=fault) as ranks:
            codes = ranks.wait()
            assert KILLED in codes and 0 not in codes, ranks.output()
    go_on(tiny, undisturbed, [2, 4])


def test_latest_never_names_an_unfinished_checkpoint(tiny: Tiny) -> None:
    latest = tiny.path("run") / "checkpoints" / "latest"
    seen = set()
    with start_ranks(_train_with_a_slow_rank, 2, tiny.flags("run")) as ranks:
        while ranks.processes[0].is_alive():
            if latest.exists():
                name = latest.read_text().strip()
                assert NAME.fullmatch(name)
                assert_intact(latest.parent / name)
                seen.add(name)
        assert ranks.wait() == [0, 0], ranks.output()
    assert len(seen) >= 2
    assert "slow" in ranks.output(1)


def _train_with_a_slow_rank(world: World, flags: list[str]) -> None:
    from fgpt.checkpoint import manager

    write = manager.write_file

    def slowly(*args: Any) -> Any:
        print("slow")
        time.sleep(0.3)
        return write(*args)

    if world.rank == 1:
        manager.write_file = slowly
    outcome = train_all(world, [flags])[0]
    assert outcome.code == 0, json.dumps(outcome.error)
