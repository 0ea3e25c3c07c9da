"""`fgpt checkpoint inspect`, `verify`, `diff` and `average`."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fgpt.checkpoint.manifest import Start, read_manifest
from fgpt.cli import main
from fgpt.config.schema import CheckpointConfig
from fgpt.data.token_dataset import open_token_dataset
from fgpt.tokenizer.load import COPY, save_copy, tokenizer_from_bytes
from tests.checkpoint.saved import FakeEngine, assert_intact, info, state_of
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
    cells = ["2", "512", "3.2500", "0.000", "4", "1", "2", "1", "2", "bf16", "plain", "weights"]
    cells += ["only", "best"]
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
    assert len(lines) == 2 and all(": intact; 1 file," in line for line in lines)
    shutil.rmtree(run / "checkpoints")
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert "name a run directory or one of its checkpoints/step_NNNNNNNN" in capsys.readouterr().err


@pytest.fixture
def changed(run: Path) -> Path:
    """A copy of the run whose newest checkpoint has 3, 1, 1 instead of 1, 1, 1."""
    other = run.with_name("other")
    engine: Any = FakeEngine(4, weights=[3.0, 1.0, 1.0])
    checkpoints(other / "checkpoints").save(engine, info(history=(Start(0, 0, LAYOUT),)))
    return other


def test_diff(run: Path, changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "diff", str(run), str(run / "checkpoints" / "step_00000004")]) == 0
    assert capsys.readouterr().out.endswith("equal, 1 tensors\n")
    assert main(["checkpoint", "diff", str(run), str(changed)]) == 1
    _, row, total = capsys.readouterr().out.splitlines()
    assert row.split() == ["w", "weight", "2", "1.15"]  # 2 / sqrt(3)
    assert total == "1 of 1 tensors differ"
    assert main(["checkpoint", "diff", str(run / "checkpoints/step_00000002"), str(changed)]) == 1
    assert "step: 2 and 4" in capsys.readouterr().out
    assert main(["checkpoint", "diff", str(run), str(run / "nothing")]) == 2
    assert "no checkpoint there" in capsys.readouterr().err


def test_average(run: Path, changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.with_name("mean")
    arguments = ["checkpoint", "average", str(run), str(run), str(changed), "--out", str(out)]
    assert main(arguments) == 0
    mean = out / "checkpoints" / "step_00000004"
    assert capsys.readouterr().out.splitlines() == [
        f"{mean}: the mean of 3 checkpoints, weights only",
        f"train on with --resume {out} and --steps above 4 beside the run's flags, or anew with"
        f" --init_from {out}",
    ]
    expected = torch.tensor([5 / 3, 1.0, 1.0])
    assert torch.equal(state_of(mean)["w", "weight"], expected)
    assert_intact(mean)
    assert f"{changed / 'checkpoints' / 'step_00000004'} (step 4)" in read_manifest(mean).origin
    assert main(arguments) == 2
    assert f"--out {out}: exists already" in capsys.readouterr().err


def test_average_of_the_last(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.with_name("mean")
    assert main(["checkpoint", "average", str(run), "--last", "2", "--out", str(out)]) == 0
    assert "the mean of 2 checkpoints" in capsys.readouterr().out
    many = ["checkpoint", "average", str(run), str(run), "--last", "2", "--out", str(out / "x")]
    assert main(many) == 2
    assert main(["checkpoint", "average", str(run), "--out", str(out / "x")]) == 2
    assert "one checkpoint has no mean: name several" in capsys.readouterr().err


def test_another_model_has_no_mean(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "larger", tmp_path / "mean"
    engine: Any = FakeEngine(3, weights=[1.0] * 4)
    checkpoints(other / "checkpoints").save(engine, info(history=(Start(0, 0, LAYOUT),)))
    assert main(["checkpoint", "average", str(run), str(other), "--out", str(out)]) == 2
    assert "w is [4], and [3] in another checkpoint" in capsys.readouterr().err
    assert not out.exists()
    assert main(["checkpoint", "diff", str(run), str(other)]) == 1
    assert "[3] and [4]" in capsys.readouterr().out


def test_another_tokenizer_has_no_mean(
    run: Path, changed: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.with_name("mean")
    tokenizer = open_token_dataset(small_data).tokenizer
    save_copy(tokenizer, run / COPY)
    argv = ["checkpoint", "average", str(run), str(changed), "--out", str(out)]
    assert main(argv) == 0  # of the other one nothing is known
    capsys.readouterr()
    assert main(["checkpoint", "inspect", str(out)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("weights: mean of ") and str(changed) in line
    save_copy(tokenizer_from_bytes(tokenizer.raw + b" ", "tokenizer.json", ""), changed / COPY)
    argv[-1] = str(run.with_name("another"))
    assert main(argv) == 2
    assert "have different tokenizers" in capsys.readouterr().err


def test_a_model_that_computes_something_else_has_no_mean(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out, engine = tmp_path / "eps", tmp_path / "mean", FakeEngine(3)
    identity = IDENTITY | {"model.norm_eps": 1e-3}
    points = checkpoints(other / "checkpoints")
    points.save(cast(Any, engine), info(identity=identity, history=(Start(0, 0, LAYOUT),)))
    assert main(["checkpoint", "average", str(run), str(other), "--out", str(out)]) == 2
    assert "model.norm_eps is 0.001, and 1e-05 in another checkpoint" in capsys.readouterr().err
    assert not out.exists()


def test_sigterm_leaves_no_half_written_average(
    run: Path, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run.with_name("mean")

    def stopped(*_: object) -> None:
        assert (out / "checkpoints" / "step_00000004.tmp").exists()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("fgpt.checkpoint.weights_only.write_file", stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "average", str(run), str(changed), "--out", str(out)])
    assert ended.value.code == 143 and not out.exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("verb", ["diff", "average"])
def test_damaged_weights_are_not_read(
    verb: str, run: Path, changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = changed / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    out = [] if verb == "diff" else ["--out", str(run.with_name("mean"))]
    assert main(["checkpoint", verb, str(run), str(changed), *out]) == 2
    assert f"{file}: its contents have changed" in capsys.readouterr().err
    assert not run.with_name("mean").exists()
