"""Damaged and malicious checkpoints are refused on all ranks before any weight changes."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fgpt.checkpoint.manifest import FILE, read_manifest
from fgpt.checkpoint.tensor_file import SavedFile
from fgpt.train.failure_record import FAILURES
from fgpt.utils.files import sha256_file
from tests.checkpoint.saved import assert_same_state
from tests.ranks import run_ranks
from tests.tiny import Outcome, Tiny, train_all

pytestmark = pytest.mark.dist

OLD, NEW = 2, 4
RANK = "rank_{:05d}.safetensors"
FIRST = RANK.format(0)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


def _cut(name: str, keep: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        os.truncate(checkpoint / name, keep((checkpoint / name).stat().st_size))

    return damage


def _flip(name: str, at: Callable[[bytes], int]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        data = bytearray((checkpoint / name).read_bytes())
        data[at(data)] ^= 1
        (checkpoint / name).write_bytes(data)

    return damage


def _swap(one: str, other: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        a, b = (checkpoint / one).read_bytes(), (checkpoint / other).read_bytes()
        (checkpoint / one).write_bytes(b)
        (checkpoint / other).write_bytes(a)

    return damage


def _link(checkpoint: Path) -> None:
    elsewhere = checkpoint.parents[1] / "elsewhere"
    (checkpoint / FIRST).rename(elsewhere)
    (checkpoint / FIRST).symlink_to(elsewhere)


def _pickle(checkpoint: Path) -> None:
    """Code in place of a file, with a matching manifest."""
    payload = pickle.dumps(Payload(checkpoint.parents[1] / "canary"))
    (checkpoint / FIRST).write_bytes(payload)
    _vouch(checkpoint)


def _other_tensors(checkpoint: Path) -> None:
    """Another safetensors file, with a matching manifest."""
    save_file({"weight": torch.zeros(3)}, checkpoint / FIRST)
    _vouch(checkpoint)


def _incomplete(checkpoint: Path) -> None:
    """A manifest without the boxes of one file."""
    manifest = read_manifest(checkpoint)
    (checkpoint / FILE).unlink()
    tensors = {
        name: replace(record, boxes=[saved for saved in record.boxes if saved.file == 0])
        for name, record in manifest.tensors.items()
    }
    replace(manifest, tensors=tensors).write(checkpoint)


def _another_step(checkpoint: Path) -> None:
    """The manifest of a checkpoint that had another name."""
    manifest = read_manifest(checkpoint)
    (checkpoint / FILE).unlink()
    replace(manifest, progress=replace(manifest.progress, step=NEW + 1)).write(checkpoint)


def _unlisted_box(checkpoint: Path) -> None:
    """A manifest with boxes in a third file, of two."""
    manifest = read_manifest(checkpoint)
    (checkpoint / FILE).unlink()
    tensors = {
        name: replace(record, boxes=[saved._replace(file=saved.file + 1) for saved in record.boxes])
        for name, record in manifest.tensors.items()
    }
    replace(manifest, tensors=tensors).write(checkpoint)


def _vouch(checkpoint: Path) -> None:
    """Write a manifest that matches the files."""
    manifest = read_manifest(checkpoint)
    files = [checkpoint / file.name for file in manifest.files]
    entries = tuple(SavedFile(p.name, p.stat().st_size, sha256_file(p)) for p in files)
    (checkpoint / FILE).unlink()
    replace(manifest, files=entries).write(checkpoint)


def _climb(checkpoint: Path) -> None:
    """A manifest that names a file outside of the directory."""
    manifest = read_manifest(checkpoint)
    (checkpoint / FILE).unlink()
    outside = replace(manifest.files[0], name="../latest")
    replace(manifest, files=(*manifest.files, outside)).write(checkpoint)


def _half(size: int) -> int:
    return size // 2


SHARDS = {f"rank {rank}": RANK.format(rank) for rank in (0, 1)}
Damages = dict[str, tuple[Callable[[Path], None], str]]
"""Name -> what is done to a checkpoint, and what the report names."""
DAMAGES: Damages = {
    **{f"{k} cut to 0": (_cut(v, lambda n: 0), v) for k, v in SHARDS.items()},
    **{f"{k} cut to half": (_cut(v, _half), v) for k, v in SHARDS.items()},
    **{f"{k} cut by a byte": (_cut(v, lambda n: n - 1), v) for k, v in SHARDS.items()},
    **{f"{k} byte flipped": (_flip(v, lambda d: len(d) // 2), v) for k, v in SHARDS.items()},
    **{f"{k} header flipped": (_flip(v, lambda d: 0), v) for k, v in SHARDS.items()},
    **{f"{k} deleted": (lambda c, v=v: (c / v).unlink(), v) for k, v in SHARDS.items()},
    "pickle": (_pickle, FIRST),
    "other tensors": (_other_tensors, FIRST),
    "another step": (_another_step, f"is of step {NEW + 1}"),
    "a file that is not listed": (_unlisted_box, "do not make up the tensor"),
    "boxes missing": (_incomplete, "do not make up the tensor"),
    "manifest digit flipped": (_flip(FILE, lambda d: d.index(b'"samples_seen": ') + 16), FILE),
    "manifest cut": (_cut(FILE, _half), FILE),
    "manifest empty": (_cut(FILE, lambda n: 0), FILE),
    "manifest deleted": (lambda c: (c / FILE).unlink(), FILE),
    "manifest is a list": (lambda c: (c / FILE).write_text("[]"), FILE),
    "manifest is nested": (lambda c: (c / FILE).write_text("[" * 100_000), FILE),
    "manifest names a file outside": (_climb, "latest"),
    "stray file": (lambda c: (c / "stray.pt").touch(), "stray.pt"),
    "ranks swapped": (_swap(RANK.format(0), RANK.format(1)), "rank_0000"),
    "steps swapped": (_swap(RANK.format(1), f"../step_{OLD:08d}/{RANK.format(1)}"), RANK.format(1)),
    "shard is a link": (_link, FIRST),
}
BOTH = ("steps swapped",)
"""Damages of both checkpoints."""


@pytest.fixture(scope="module")
def intact(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run with checkpoints of steps OLD and NEW, its last."""
    tiny = Tiny(tmp_path_factory.mktemp("damage"), small_data)
    assert run_ranks(train_all, 2, [tiny.flags("intact", "--steps", NEW)])[0][0].code == 0
    return tiny


def after(tiny: Tiny, damages: Damages, ranks: int, *flags: object) -> dict[str, list[Outcome]]:
    """Return damage -> outcome of each rank with --resume auto, in the same processes."""
    runs = []
    for name, (damage, _) in damages.items():
        shutil.copytree(tiny.path("intact"), tiny.path(name))
        damage(tiny.checkpoint(name, NEW))
        again = ("--steps", NEW, "--resume", "auto")
        runs.append(tiny.flags(name, *flags, *again, ds=tiny.folder / "ds.json"))
    outcomes = run_ranks(train_all, ranks, runs, timeout_s=150)
    return dict(zip(damages, map(list, zip(*outcomes, strict=True)), strict=True))


@pytest.fixture(scope="module")
def resumed(intact: Tiny) -> dict[str, list[Outcome]]:
    """Damage -> outcome of each rank."""
    return after(intact, DAMAGES, 2)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_passed_over(
    intact: Tiny, resumed: dict[str, list[Outcome]], name: str
) -> None:
    leader, other = resumed[name]
    assert not intact.path(name).joinpath("canary").exists()
    if name in BOTH:
        assert leader.code == other.code == 2
        assert "no usable checkpoint" in leader.error and leader.error == other.error
        return
    assert leader.code == other.code == 0, leader.error
    passed_over(intact, leader, name, DAMAGES[name][1])


def passed_over(tiny: Tiny, leader: Outcome, name: str, named: str) -> None:
    """The damaged checkpoint was reported, and written again from the one before."""
    said = [line for line in leader.output.splitlines() if "unusable checkpoint skipped" in line]
    assert len(said) == 1 and named in said[0] and f"step_{NEW:08d}" in said[0]
    assert f"resuming from {tiny.checkpoint(name, OLD)}" in leader.output
    assert tiny.losses(name) == tiny.losses("intact")
    assert_same_state(tiny.checkpoint(name, NEW), tiny.checkpoint("intact", NEW))


LAST = RANK.format(3)
PIPE: Damages = {
    "last rank deleted": (lambda c: (c / LAST).unlink(), LAST),
    "last rank cut": (_cut(LAST, _half), LAST),
    "second rank flipped": (_flip(RANK.format(1), lambda d: len(d) // 2), RANK.format(1)),
    "tensor ranks swapped": (_swap(RANK.format(0), RANK.format(1)), "rank_0000"),
    "stages swapped": (_swap(RANK.format(0), RANK.format(2)), "rank_0000"),
}
TENSOR: Damages = {
    "weights deleted": (lambda c: (c / RANK.format(1)).unlink(), RANK.format(1)),
    "ranks swapped": (_swap(RANK.format(0), RANK.format(1)), "rank_0000"),
}
GRIDS = {
    # ranks, ZeRO stage, flags, damages
    "tp 2, pp 2": (4, 1, ("--tp=2", "--pp=2"), PIPE),
    "tp 2, ZeRO-3": (2, 3, ("--tp=2",), TENSOR),
}


@pytest.mark.parametrize("name", GRIDS)
def test_damage_of_one_rank_is_known_to_all(tiny: Tiny, name: str) -> None:
    n, stage, flags, damages = GRIDS[name]
    ds = tiny.ds(zero_optimization={"stage": stage})
    whole = tiny.flags("intact", *flags, "--steps", NEW, ds=ds)
    assert run_ranks(train_all, n, [whole])[0][0].code == 0
    for damage, outcomes in after(tiny, damages, n, *flags).items():
        assert [outcome.code for outcome in outcomes] == [0] * n, outcomes[0].error
        passed_over(tiny, outcomes[0], damage, damages[damage][1])
        assert not tiny.path(damage).joinpath("canary").exists()


def test_all_damaged_is_an_error_and_not_a_fresh_start(intact: Tiny) -> None:
    shutil.copytree(intact.path("intact"), intact.path("all"))
    for step in (OLD, NEW):
        _cut(FIRST, _half)(intact.checkpoint("all", step))
    before = {*intact.path("all").rglob("*")}
    auto, path = run_ranks(
        train_all,
        2,
        [
            intact.flags("all", "--resume", "auto"),
            intact.flags("all", "--resume", intact.checkpoint("all", NEW)),
        ],
    )[1]
    assert auto.code == path.code == 2
    assert f"step_{OLD:08d}" in auto.error and f"step_{NEW:08d}" in auto.error
    assert "\n" not in auto.error and "--resume none" in auto.error
    assert f"step_{OLD:08d}" not in path.error
    record = intact.path("all") / FAILURES  # the only file that is new
    assert {*intact.path("all").rglob("*")} == before | {record}


def test_a_named_damaged_checkpoint_is_not_replaced_by_another(intact: Tiny) -> None:
    shutil.copytree(intact.path("intact"), intact.path("named"))
    _cut(FIRST, _half)(intact.checkpoint("named", NEW))
    flags = intact.flags("named", "--resume", intact.checkpoint("named", NEW))
    for outcome in run_ranks(train_all, 2, [flags])[0]:
        assert outcome.code == 2 and FIRST in outcome.error


def test_latest_is_only_for_people(intact: Tiny) -> None:
    names, runs = [], []
    for i, content in enumerate(("../../x\n", "/etc\n", "", "step_99999999\n", "\0\n")):
        names.append(f"latest{i}")
        shutil.copytree(intact.path("intact"), intact.path(names[-1]))
        (intact.path(names[-1]) / "checkpoints" / "latest").write_text(content)
        runs.append(intact.flags(names[-1], "--steps", NEW, "--resume", "auto"))
    for name, outcome in zip(names, run_ranks(train_all, 2, runs)[0], strict=True):
        assert outcome.code == 0 and f"at step {NEW}" in outcome.output
        latest = intact.path(name) / "checkpoints" / "latest"
        assert latest.read_text() == f"step_{NEW:08d}\n"


def not_finite(checkpoint: Path, state: str, value: float) -> None:
    """Plant a value in a state of a weight, with hashes that match."""
    manifest = read_manifest(checkpoint)
    tensors = load_file(checkpoint / FIRST)
    key = next(key for key in tensors if f":{state}[" in key and tensors[key].numel() > 3)
    tensors[key].view(-1)[3] = value
    save_file(tensors, checkpoint / FIRST)
    data = (checkpoint / FIRST).read_bytes()
    entry = SavedFile(FIRST, len(data), sha256_file(checkpoint / FIRST))
    replace(manifest, files=(entry, *manifest.files[1:])).write(checkpoint)


def test_values_that_are_not_finite_are_refused(intact: Tiny) -> None:
    """Though every hash is right: by all ranks, also by those that do not read the tensor."""
    runs = []
    for state, value in (("weight", math.nan), ("exp_avg", math.inf)):
        shutil.copytree(intact.path("intact"), intact.path(state))
        not_finite(intact.checkpoint(state, NEW), state, value)
        runs.append(intact.flags(state, "--resume", "auto"))
        # a refused run of this process still holds the lock of its directory
        earlier = ("--resume", intact.checkpoint(state, OLD))
        runs.append(intact.flags(f"{state} earlier", *earlier))
    for outcomes in run_ranks(train_all, 2, runs):
        for state, refused, followed in zip(
            ("weight", "exp_avg"), outcomes[::2], outcomes[1::2], strict=True
        ):
            assert refused.code == 2 and "\n" not in refused.error
            assert f"{intact.checkpoint(state, NEW)}: {state} of " in refused.error
            assert "has values that are not finite: name an earlier one" in refused.error
            assert followed.code == 0, followed.error  # an earlier checkpoint, as it says


def test_a_linked_checkpoint_is_not_followed(intact: Tiny) -> None:
    shutil.copytree(intact.path("intact"), intact.path("linked"))
    target = intact.folder / "outside"
    intact.checkpoint("linked", NEW).rename(target)
    intact.checkpoint("linked", NEW).symlink_to(target)
    flags = intact.flags("linked", "--steps", NEW, "--resume", "auto")
    outcome = run_ranks(train_all, 2, [flags])[0][0]
    assert f"at step {OLD}" in outcome.output and target.exists()
