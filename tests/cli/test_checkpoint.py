"""`fgpt checkpoint inspect` and `verify`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fgpt.checkpoint.manifest import Start
from fgpt.cli import main
from fgpt.config.schema import CheckpointConfig
from tests.checkpoint.saved import FakeEngine, info
from tests.checkpoint.test_file_systems import checkpoints

LAYOUT = {"ranks": 4, "tp": 1, "pp": 2, "cp": 1, "ZeRO": 2, "precision": "bf16", "engine": "plain"}
IDENTITY = {"data.seq_len": 32}


@pytest.fixture
def run(tmp_path: Path, one_rank: None) -> Path:
    """A run directory with checkpoints of steps 2 and 4, the first one the best."""
    root = tmp_path / "run 1" / "checkpoints"
    points = checkpoints(root, options=CheckpointConfig(best=True))
    for step, loss in ((2, 3.25), (4, 3.5)):
        engine: Any = FakeEngine(step)
        history = (Start(0, 0, LAYOUT),)
        about = {"tokens_seen": 256 * step, "identity": IDENTITY, "history": history}
        points.save(engine, info(**about, valid_loss=loss))
    return root.parent


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(run)]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["checkpoint", "step", "tokens"]
    cells = ["2", "512", "3.2500", "0.000", "4", "1", "2", "1", "2", "bf16", "plain", "AdamW"]
    cells.append("best")
    assert "step_00000002" in first and first.split()[-len(cells) :] == cells
    assert "step_00000004" in second and "1,024" in second and "3.5000" in second
    assert second.rstrip().endswith("newest")


def test_inspect_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run / "checkpoints" / "step_00000004"
    assert main(["checkpoint", "inspect", "--json", str(one)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    manifest = json.loads(line)
    assert manifest["path"] == str(one) and manifest["valid_loss"] == 3.5
    assert manifest["identity"] == IDENTITY and len(manifest["files"]) == 1


@pytest.mark.parametrize("damage", ["file", "manifest", "missing"])
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_damage(verb: str, damage: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other checkpoint is still shown; what is wrong is one line each, and exit code 2."""
    newest = run / "checkpoints" / "step_00000004"
    if damage == "file":
        path = newest / "rank_00000.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "manifest":
        (newest / "manifest.json").write_text("{}")
    else:
        (newest / "rank_00000.safetensors").unlink()
    is_seen = verb == "verify" or damage == "manifest"  # inspect reads manifests only
    assert main(["checkpoint", verb, str(run)]) == (2 if is_seen else 0)
    said = capsys.readouterr()
    assert "step_00000002" in said.out
    assert len(said.err.splitlines()) == is_seen and ("step_00000004" in said.err) == is_seen


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(": intact; 1 files" in line for line in lines)
    shutil.rmtree(run / "checkpoints")
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert "name a run directory or one of its checkpoints/step_NNNNNNNN" in capsys.readouterr().err
