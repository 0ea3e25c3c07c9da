"""`fgpt bench checkpoint` on a small model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fgpt.cli import main
from fgpt.report.checkpoint_table import read_save_records, save_tables


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_measures_both_formats(tmp_path: Path) -> None:
    out, folder = tmp_path / "records.jsonl", tmp_path / "checkpoints"
    folder.mkdir()
    command = [sys.executable, "-m", "fgpt.cli", "bench", "checkpoint", "--rows", "tiny"]
    command += ["--rounds", "1", "--dir", str(folder), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "tiny, bf16 ZeRO-2, 2 ranks" in done.stdout
    (record,) = map(json.loads, out.read_text().splitlines())
    values = {name: median for name, (median, _, _) in record["values"].items()}
    assert 0 < values["bytes"] < 0.9 * values["deepspeed_bytes"]
    assert values["stall_s"] == pytest.approx(values["copy_s"] + values["commit_s"])
    assert math.isfinite(values["lost_s"]) and "lost / deepspeed" in values
    (saved,) = read_save_records([out])
    assert "| save, s | " in save_tables([saved]) and saved.engine == "tiny, bf16 ZeRO-2, 2 ranks"
    assert (record["zero"], record["precision"], record["rounds"]) == (2, "bf16", 1)
    for name in ("save_s", "verify_s", "load_s", "deepspeed_save_s", "deepspeed_load_s", "step_s"):
        assert values[name] > 0
    assert list(folder.iterdir()) == []
    assert str(tmp_path) not in out.read_text()


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "a.jsonl")]
    assert main(["bench", "checkpoint", "--dir", str(tmp_path / "missing"), *out]) == 2
    assert "--dir" in capsys.readouterr().err
    assert main(["bench", "checkpoint", "--dir", str(tmp_path), "--rows", "gpt3-175b", *out]) == 2
    assert "GiB are needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "checkpoint", "--rows", "huge"])
    assert "'huge' is none of tiny" in capsys.readouterr().err
