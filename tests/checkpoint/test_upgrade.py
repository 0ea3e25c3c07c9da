"""`fgpt checkpoint upgrade`: DeepSpeed's own checkpoints become ones of the present format.

Each engine saves the same step twice: with DeepSpeed's `save_checkpoint` and in the present format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.checkpoint.manifest import FILE, HASH_KEY, manifest_hash, read_manifest
from fgpt.checkpoint.upgrade import upgrade
from fgpt.cli import main
from fgpt.config.resolve import Resolved
from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from fgpt.errors import CheckpointError
from tests.checkpoint.saved import assert_intact, assert_same_tensors, save_engine
from tests.checkpoint.test_damage import Payload
from tests.engine.runs import BASE, resolved_run, train_steps, variant
from tests.ranks import run_ranks, start_ranks
from tests.tiny import zero

pytestmark = pytest.mark.dist

STEP = 2
NAME = f"step_{STEP:08d}"
BF16 = {"bf16": {"enabled": True}}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ADAM_8BIT = {"optimizer": {"type": "AdamW8bit", "params": {"min_8bit_size": 256}}}


# name -> (DeepSpeed JSON, settings of the run); on two ranks, but "plain"
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (BF16, {"train__engine": "plain"}),
    "z0": (zero(0), {}),
    "z1 8-bit": (zero(1) | ADAM_8BIT, {}),
    "z2 bf16": (zero(2) | BF16, {}),
    "z2 round robin": (zero(2, round_robin_gradients=True), {}),
    "z2 aligned offload": (
        zero(2, parameter_alignment=True, offload_optimizer={"device": "cpu"}),
        {},
    ),
    "z1 sums": (zero(1) | BF16 | SUMS, {}),
    "z3 groups": (zero(3, sub_group_size=5000), {}),
    "pp2": (zero(1), {"parallel__pp": 2}),
    "pp2 z0": (zero(0), {"parallel__pp": 2}),
    "tp2": (zero(1), {"parallel__tp": 2, "model__vocab_size": 511}),
    "tp2 z3": (zero(3), {"parallel__tp": 2}),
}


def save_twice(world: World, folder: Path, names: Sequence[str]) -> None:
    """Save each layout's state after STEP steps in both formats."""
    for name in names:
        config, settings = LAYOUTS[name]
        small = {"model__d_model": 32, "model__n_head": 2, "model__n_layer": 2, **settings}
        own = folder / name / f"rank{world.rank}"
        resolved = resolved_run(own, variant(**config), world.size, **small)
        engine = build_engine(resolved, world, torch.device("cpu"))
        train_steps(resolved, world, engine, STEP)
        save_engine(engine, world, folder / name / "new")
        old = folder / name / "run" / "checkpoints"
        old.mkdir(parents=True, exist_ok=True)
        save_version1(engine, world, resolved, old)
        engine.close()


def save_version1(engine: Any, world: World, resolved: Resolved, root: Path) -> None:
    """Save as earlier FGPTs did: DeepSpeed's files or the plain engine's, and their manifest."""
    if resolved.run.train.engine == "plain":
        (root / NAME).mkdir()
        state = {
            "masters": [master.detach() for _, master in engine.masters],
            "optimizer": engine.optimizer.state_dict(),
            "step": STEP,
            "skipped_steps": 0,
        }
        torch.save(state, root / NAME / "plain_engine.pt")
    else:
        engine.deepspeed.save_checkpoint(str(root), tag=NAME, save_latest=False)
    if world.is_rank0:
        write_manifest1(root / NAME, resolved)


def write_manifest1(checkpoint: Path, resolved: Resolved) -> None:
    """Write a manifest of version 1 for the files that are there."""
    batch, run = resolved.batch, resolved.run
    identity = {f"model.{n}": v for n, v in dataclasses.asdict(run.model).items()}
    for field in ("model.preset", "model.attention"):
        del identity[field]
    identity |= {
        "data (fingerprint of the data card)": "data",
        "data.seq_len": run.data.seq_len,
        "data.seed": run.data.seed,
        "train.seed": run.train.seed,
        "train.engine": run.train.engine,
        "global batch (samples)": batch.global_size,
        "number of ranks": batch.world,
        "tensor-parallel ranks (tp)": batch.tp,
        "pipeline stages (pp)": batch.pp,
        "context-parallel ranks (cp)": batch.cp,
        "parallel.partition": run.parallel.partition,
        "precision": resolved.precision,
        "ZeRO stage": resolved.zero_stage,
        "optimizer": resolved.deepspeed["optimizer"]["type"],
    }
    values = {
        "version": 1,
        "step": STEP,
        "samples_seen": STEP * batch.global_size,
        "identity": identity,
        "config": resolved.to_json(),
        "files": [entry(path) for path in sorted(checkpoint.iterdir()) if path.name != FILE],
        "is_permanent": True,
        "valid_loss": 3.5,
    }
    values = json.loads(json.dumps(values))
    (checkpoint / FILE).write_text(json.dumps(values | {HASH_KEY: manifest_hash(values)}))


def entry(path: Path) -> dict[str, Any]:
    """A file as a manifest lists it."""
    data = path.read_bytes()
    return {
        "name": path.name,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout's state in both formats."""
    folder = tmp_path_factory.mktemp("upgrade")
    run_ranks(save_twice, 1, folder, ["plain"])
    run_ranks(save_twice, 2, folder, [name for name in LAYOUTS if name != "plain"])
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of one old run directory."""
    return Path(shutil.copytree(saved / "z2 bf16" / "run", tmp_path / "run"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_upgraded(saved: Path, name: str, tmp_path: Path) -> None:
    """Every weight, state and counter; and what the manifest said."""
    run = Path(shutil.copytree(saved / name / "run", tmp_path / "run"))
    (line,) = upgrade(run)
    checkpoint = run / "checkpoints" / NAME
    assert "converted" in str(line) and f"kept as {NAME}.v1" in str(line)
    assert_same_tensors(checkpoint, saved / name / "new" / NAME)
    assert_intact(checkpoint)
    manifest = read_manifest(checkpoint)
    assert manifest.samples_seen == STEP * BASE["train_batch_size"]
    assert manifest.is_permanent and manifest.valid_loss == 3.5
    layout = manifest.history[0].layout
    config = LAYOUTS[name][1]
    assert layout["pp"] == config.get("parallel__pp", 1)
    assert layout["tp"] == config.get("parallel__tp", 1)
    # a second time there is nothing to do, and the old files are as they were
    (line,) = upgrade(run)
    assert "nothing to do" in str(line)
    kept, original = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (checkpoint.with_name(f"{NAME}.v1"), saved / name / "run/checkpoints" / NAME)
    )
    assert kept == original


def test_the_verb(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert f"fgpt checkpoint upgrade {run / 'checkpoints' / NAME}" in capsys.readouterr().err
    # a path without a checkpoint does not keep the others from being converted
    assert main(["checkpoint", "upgrade", str(run / "nothing"), str(run)]) == 2
    said = capsys.readouterr()
    assert "no checkpoint there" in said.err and "converted" in said.out
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert main(["checkpoint", "upgrade", str(run)]) == 0


@pytest.mark.parametrize("damage", ["cut", "code"])
def test_damage_is_refused_and_nothing_changes(run: Path, damage: str) -> None:
    checkpoint = run / "checkpoints" / NAME
    file = next(path for path in checkpoint.iterdir() if "optim" in path.name)
    if damage == "cut":
        os.truncate(file, 1000)
    else:  # with a matching manifest
        file.write_bytes(pickle.dumps(Payload(run / "canary")))
        values = json.loads((checkpoint / FILE).read_text())
        del values[HASH_KEY]
        values["files"] = [entry(p) for p in sorted(checkpoint.iterdir()) if p.name != FILE]
        (checkpoint / FILE).write_text(json.dumps(values | {HASH_KEY: manifest_hash(values)}))
    before = sorted(run.rglob("*"))
    (error,) = upgrade(run)
    assert isinstance(error, CheckpointError) and file.name in str(error)
    assert "\n" not in str(error) and sorted(run.rglob("*")) == before


@pytest.mark.parametrize("point", ["before_set_aside", "before_rename"])
@pytest.mark.parametrize("action", ["kill", "full"])
def test_interrupted(run: Path, point: str, action: str, saved: Path) -> None:
    """Killed, the next upgrade finishes; on a full disk nothing has changed."""
    env = {"FGPT_FAULT": f"{point}:0:{STEP}:{action}"}
    with start_ranks(upgrade_in, 1, run, env=env, join=False) as ranks:
        (code,) = ranks.wait()
    checkpoint = run / "checkpoints" / NAME
    if action == "full":
        assert code == 2 and steps_in(run) == [NAME]
    else:
        assert code == -9
    (line,) = upgrade(run)
    assert "converted" in str(line)
    assert_same_tensors(checkpoint, saved / "z2 bf16" / "new" / NAME)
    assert steps_in(run) == [NAME, f"{NAME}.v1"]


def steps_in(run: Path) -> list[str]:
    """The checkpoints of a run and what belongs to them; DeepSpeed also copies scripts there."""
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def upgrade_in(world: World, run: Path) -> None:
    """Run the verb; its exit code is the process's."""
    os._exit(main(["checkpoint", "upgrade", str(run)]))
