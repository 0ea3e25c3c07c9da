"""`fgpt parity` as a user calls it; names of layouts; which are legal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fgpt.cli import main
from fgpt.config.resolve import RunRequest
from fgpt.errors import ConfigError, UserError
from fgpt.parity.layouts import Layout, all_layouts, make_compared_run, parse_layout, valid_layouts
from fgpt.utils.strict_json import read_object
from tests.parity.comparing import compared_run
from tests.ranks import ROOT


@pytest.mark.parametrize(
    "name", ["dp", "tp2", "pp4", "tp2pp2sp", "cp2zero3", "tp2cp2spzero2ckpt", "zero0", "ckpt"]
)
def test_names_are_read_as_they_are_written(name):
    assert parse_layout(name).name == name


def test_parts_may_stand_in_any_order():
    assert parse_layout("zero1sppp2tp4") == Layout(tp=4, pp=2, sequence=True, stage=1)


@pytest.mark.parametrize(
    "name", ["", "foo", "tp", "tp2tp2", "zero4", "tp2,", "spsp", "TP2", "tp2 pp2"]
)
def test_what_is_no_layout(name):
    with pytest.raises(UserError, match="is not a layout at"):
        parse_layout(name)


def test_every_layout_of_four_ranks_has_its_own_name():
    names = [layout.name for layout in all_layouts(4)]
    assert len(names) == len(set(names)) == 100
    assert all(parse_layout(name).name == name for name in names)


def test_legal_layouts_of_four_ranks():
    """By hand: 6 grids without stages and 3 of them with sequence parallelism have ZeRO 0-3 and one
    recomputed; 4 with stages and 1 with sequence parallelism have ZeRO 0-1 and one recomputed.
    """
    names = {layout.name for layout, _ in valid_layouts(compared_run(4))}
    assert len(names) == 9 * 5 + 5 * 3
    assert {"zero3", "tp4spzero2", "pp4zero0", "tp2pp2spzero1ckpt", "pp2cp2zero1"} <= names
    assert not {"pp2zero2", "spzero1", "tp2pp2zero3"} & names


def test_a_rule_refuses_a_layout_with_its_numbers():
    what = compared_run(2, {"model.n_head": 6, "model.n_kv_head": 3, "model.d_model": 48})
    with pytest.raises(ConfigError, match="3 is not a multiple of tp 2"):
        what.resolved(parse_layout("tp2"))


def test_every_layout_trains_on_the_same_global_batch():
    what = compared_run(4)
    for layout, resolved in valid_layouts(what):
        batch = resolved.batch
        assert (batch.global_size, batch.micro) == (8, 2), layout
    assert what.oracle().batch.accumulation == 4


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda f: f.name)
def test_every_shipped_json_has_an_oracle(file):
    request = RunRequest(file)
    if file.stem == "fp16":
        with pytest.raises(UserError, match="fp16"):
            make_compared_run(read_object(file), request, 2, "cpu", 1)
    else:
        what = make_compared_run(read_object(file), request, 2, "cpu", 1)
        assert what.oracle().run.train.engine == "plain"
        assert (
            what.resolved(parse_layout("cp2")).batch.global_size == what.oracle().batch.global_size
        )


def test_what_only_deepspeed_reads_is_kept_from_the_oracle():
    noise = {"csv_monitor": {"enabled": True}, "communication_data_type": "fp32"}
    rest = {"activation_checkpointing": {"partition_activations": True}}
    what = compared_run(2, {"parallel.tp": 2}, {**noise, **rest})
    assert what.resolved(parse_layout("tp2")).deepspeed["csv_monitor"]["enabled"]
    assert what.oracle().deepspeed["activation_checkpointing"] == {}


def test_a_users_grid_leaves_room_for_every_other():
    what = compared_run(4, {"parallel.tp": 2, "parallel.pp": 2})
    assert what.global_batch == 8  # micro 2 x accumulation 1 x dp 1 would be 2
    assert what.resolved(parse_layout("zero3")).batch.dp == 4


def test_a_division_by_hand_is_for_the_users_own_stages():
    what = compared_run(2, {"parallel.pp": 2, "parallel.partition": "3,1"})
    assert what.resolved(parse_layout("pp2")).run.parallel.partition == "3,1"
    assert what.resolved(parse_layout("tp2")).run.parallel.partition == "parameters"
    uniform = replace(what, partition="uniform")
    assert uniform.resolved(parse_layout("pp2")).run.parallel.partition == "uniform"
    alone = compared_run(2, {"parallel.partition": "3,1"})  # of a layout with stages
    assert alone.resolved(parse_layout("pp2")).run.parallel.partition == "3,1"


def parity(*flags, cwd=ROOT, timeout_s=170):
    command = [sys.executable, "-m", "fgpt.cli", "parity", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout_s
    )


SMALL = ("--set", "model.n_layer=2", "--set", "data.seq_len=32", "--set", "model.d_model=64")


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_the_table(tmp_path):
    """From another directory, with nothing but the package."""
    out = tmp_path / "records" / "parity.jsonl"
    flags = ["--ranks", "2", "--layouts", "tp2sp,pp2", "--steps", "3", "--out", str(out)]
    done = parity(*flags, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 layouts: the same run" in done.stdout
    assert "Traceback" not in done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["layout"] for record in records] == ["tp2sp", "pp2"]
    for record in records:
        assert record["verdict"]["loss"] < 1e-5 and record["verdict"]["departures"] == {}
        assert record["sent_bytes"].pop("other") < 4096
        assert record["sent_bytes"] == record["predicted_bytes"]
    assert records[0]["sent_bytes"]["tensor"] > 0 and "pipe" in records[1]["sent_bytes"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--layouts", "tp3"], "world 4 is not a multiple of tp 3"),
        (
            ["--layouts", "pp2zero2"],
            "layout pp2zero2: built-in.json: zero_optimization.stage",
        ),
        (["--layouts", "nonsense"], "'nonsense' is not a layout at 'nonsense'"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--ranks", "0"], "0 is not a whole number from 1 to 10^9"),
        (["--ranks", "9" * 30], "is not a whole number from 1 to 10^9"),
        (
            ["--ranks", "9999", "--global_batch", "19998"],
            "9,999 ranks on this machine: at most 512",
        ),
        (["--layouts", "pp0"], "'pp0' is not a layout at 'pp0'"),
        (["--ds_config", "absent.json"], "absent.json: does not exist"),
        (["--ds_config", "ds_configs/zero1.json", "--precision", "bf16"], "leave the flag out"),
        (["--out", "/proc/nowhere/x"], "--out /proc/nowhere/x: No such file or directory"),
        (["--out", "fgpt"], "--out fgpt: Is a directory"),
    ],
)
def test_wrong_input_is_said_before_there_are_ranks(flags, says, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the verb's own choice would stay
    monkeypatch.delenv("RANK", raising=False)
    try:
        code = main(["parity", *flags])
    except SystemExit as error:  # argparse's
        code = error.code
    said = capsys.readouterr().err
    assert code == 2
    assert says in said and "/tmp" not in said


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_layouts(precision):
    flags = ("--model", "tiny", "--layouts", "all", "--precision", precision)
    done = parity(*flags, timeout_s=1790)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{60 if precision == 'fp32' else 46} layouts: the same run" in done.stdout
