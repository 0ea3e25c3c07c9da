"""A resume may change the layout; what makes another run must be allowed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpt.checkpoint.identity import begins_anew, check_identity, check_shapes, run_identity
from fgpt.checkpoint.tensor_file import TensorRecord
from fgpt.config.resolve import resolve
from fgpt.errors import CheckpointError
from tests.run_flags import parse_run_flags

DS = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}


def identity(folder: Path, *flags: str) -> dict[str, Any]:
    file = folder / "ds.json"
    file.write_text(json.dumps(DS))
    request = parse_run_flags(["--ds_config", str(file), *flags])
    return run_identity(resolve(request, world=4, device="cpu"), "data")


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (["--tp", "2"], ["--tp", "4"]),
        (["--pp", "2"], ["--cp", "4"]),
        (["--tp", "2"], ["--tp", "2", "--sequence"]),
        ([], ["--set", "speed.loss=plain", "--set", "speed.matmul=torch"]),
        (["--set", "speed.compile=off"], []),
        (["--pp", "2", "--set", "parallel.partition=1,3"], ["--pp", "2"]),
    ],
)
def test_the_same_run(there: list[str], here: list[str], tmp_path: Path) -> None:
    assert check_identity(identity(tmp_path, *there), identity(tmp_path, *here), "x") == ()


# flags -> the kind of --allow, whether reading begins anew
OTHERS = {
    "--set=data.packing=best_fit": ("data", True),
    "--set=data.seq_len=16": ("seq_len", True),
    "--set=data.seed=5": ("seed", True),
    "--seed=5": ("seed", False),
    "--set=model.dropout=0.5": ("model", False),
}


@pytest.mark.parametrize("flag", OTHERS)
def test_what_must_be_allowed(flag: str, tmp_path: Path) -> None:
    kind, anew = OTHERS[flag]
    saved, current = identity(tmp_path), identity(tmp_path, flag)
    with pytest.raises(CheckpointError, match=f"let it differ with --allow {kind}, or start"):
        check_identity(saved, current, "x")
    with pytest.raises(CheckpointError, match=f"--allow batch,{kind}, or"):
        check_identity(saved, current, "x", ["batch"])
    (change,) = check_identity(saved, current, "x", [kind])
    assert " -> " in change and begins_anew([change]) == anew


def test_a_field_younger_than_the_checkpoint_has_its_default(tmp_path: Path) -> None:
    old = identity(tmp_path)
    for name in ("z_loss", "logit_softcap", "embedding_scale", "init_residual", "window"):
        del old[f"model.{name}"]
    assert check_identity(old, identity(tmp_path), "x") == ()
    changed = identity(tmp_path, "--set=model.z_loss=1e-4", "--set=model.window=8")
    with pytest.raises(CheckpointError) as error:
        check_identity(old, changed, "x")
    assert "go on as before with --set model.window=null --set model.z_loss=0.0" in str(error.value)


def test_several_kinds_are_named_together(tmp_path: Path) -> None:
    saved = identity(tmp_path) | {"global batch (samples)": 4}
    text = (
        "go on as before with --set data.packing=stream --global_batch 4 --seed 1234, let it differ"
        " with --allow batch,data,seed, or start"
    )
    with pytest.raises(CheckpointError, match=text):
        check_identity(saved, identity(tmp_path, "--seed=5") | {"data.packing": "best_fit"}, "x")


def test_the_flags_of_another_batch_or_ramp(tmp_path: Path) -> None:
    """One spelling of a ramp; a ramp of one part is a constant batch."""
    ramp = "--set=train.batch_ramp={}"
    batch = ("--global_batch=16", "--micro_batch=2")
    ramped, constant = (
        identity(tmp_path, *batch, ramp.format("0:8, 5:16")),
        identity(tmp_path, *batch),
    )
    same = identity(tmp_path, *batch, ramp.format("0:8,5:16"))
    assert check_identity(ramped, same, "x") == ()
    one = identity(tmp_path, *batch, ramp.format("0:16"))
    assert check_identity(constant, one, "x") == ()
    with pytest.raises(CheckpointError, match="with --set train.batch_ramp=null --global_batch 16"):
        check_identity(constant, ramped, "x")
    text = "with --set train.batch_ramp=0:8,5:16 --global_batch 16, let"
    with pytest.raises(CheckpointError, match=text):
        check_identity(ramped, constant, "x")


def test_another_shape_is_never_allowed() -> None:
    record = TensorRecord((2, 3), {"weight": "F32"}, [])
    manifest: Any = SimpleNamespace(
        tensors={"w": record}, identity={"model.n_head": 2}, origin=None
    )
    here = {"model.n_head": 2}
    check_shapes(manifest, {"w": (2, 3)}, here, "x")
    with pytest.raises(CheckpointError, match=r"w: checkpoint \[2, 3\], this run \[2, 4\]"):
        check_shapes(manifest, {"w": (2, 4)}, here, "x")
    with pytest.raises(CheckpointError, match=r"v: checkpoint none, this run \[5\]"):
        check_shapes(manifest, {"w": (2, 3), "v": (5,)}, here, "x")
    with pytest.raises(
        CheckpointError, match="another model: model.n_head: checkpoint 2, this run 4; v: "
    ):
        check_shapes(manifest, {"w": (2, 3), "v": (5,)}, {"model.n_head": 4}, "x")
    manifest.origin = {"path": "gpt2"}
    with pytest.raises(CheckpointError, match="repeat the run's --init_from, which gave it"):
        check_shapes(manifest, {"w": (2, 4)}, here, "x")
