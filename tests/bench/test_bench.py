"""`fgpt bench single`: real short runs, resumption, and wrong arguments."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fgpt.cli import main
from tests.ranks import ROOT


def bench(*flags, timeout=150):
    command = [sys.executable, "-m", "fgpt.cli", "bench", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(170)
def test_run_and_resumption(tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    flags = ("single", "--rows", "seed-1m", "--minutes", "0.01", "--out", str(out))
    done = bench(*flags, "--only", "deepspeed")
    assert done.returncode == 0, done.stderr + done.stdout
    assert [r["env_name"] for r in lines(out)] == ["base", "deepspeed"]
    assert str(ROOT) not in out.read_text()  # records are published
    for record in lines(out):
        assert record["state"] == "measured" and record["loss_departure"] <= 1e-4
        assert len(record["train"]["round_s"]) == len(record["predict"]["round_s"]) >= 1
        assert {"commit", "hardware", "machine", "product_tflops"} <= record["environment"].keys()
        assert record["config"]["deepspeed"]["gradient_clipping"] == 1.0
        assert record["memory"]["peak_bytes"] > 4 * record["parameters"]
        assert 0 < record["peak_tflops"] and record["flops_per_token"] > 0
    assert "x: relative to base" in done.stdout and "records:" in done.stdout
    with open(out, "a") as file:
        file.write('{"format": 1, "torn')  # as by a kill while writing
    assert main(["bench", *flags, "--only", "deepspeed"]) == 0
    output = capsys.readouterr().out
    assert output.count("measured before") == 2
    assert "ready in" not in output


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["single", "--rows", "seed-1m", "--only", "fast"],
            "--only fast: unknown; known are: base",
        ),
        (["sinlge"], "name one of single, multi, data"),
        ([], "name one of single, multi, data"),
        (["multi", "--hostfile", "no-such-file"], "--hostfile no-such-file: cannot be read"),
        (["single", "--trace", "Makefile"], "--trace Makefile"),
    ],
)
def test_wrong_arguments(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
def test_wrong_minutes(minutes, capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", "single", "--minutes", minutes])
    assert error.value.code == 2
    assert "not a number of minutes" in capsys.readouterr().err


def test_unwritable_records_are_refused_before_measuring(tmp_path, capsys):
    assert main(["bench", "single", "--out", str(tmp_path)]) == 2
    assert "name a file" in capsys.readouterr().err
