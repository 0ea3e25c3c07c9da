"""The same run under every launcher and layout: losses, validation, sample text.

torchrun, deepspeed and accelerate, with the shipped files; layouts against one process, without
DeepSpeed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.launched import Launch
from tests.ranks import ROOT, free_port, run_ranks
from tests.tiny import Tiny, train_all

PER_SAMPLE = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 8}
LAYOUTS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    # ranks, changes of the JSON, flags
    "tp 2, pp 2": (4, {"zero_optimization": {"stage": 1}}, ("--tp=2", "--pp=2")),
    "cp 2": (2, {"zero_optimization": {"stage": 2}}, ("--cp=2",)),
    "pp 2, dp 2": (4, {"zero_optimization": {"stage": 1}}, ("--pp=2",)),
    "tp 2, cp 2": (4, {"zero_optimization": {"stage": 3}}, ("--tp=2", "--cp=2")),
}
DS = ROOT / "ds_configs" / "zero2.json"
YAML = ROOT / "launchers" / "accelerate" / "zero2.yaml"


@pytest.mark.dist
@pytest.mark.timeout(170)
def test_every_launcher_trains_the_same_run(tiny: Tiny) -> None:
    def flags(run: str) -> list[str]:
        return tiny.flags(run, "--steps", 20, "--set=checkpoint.every=10", ds=DS)

    port = str(free_port())
    launchers = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", port],
        "accelerate": ["accelerate", "launch", "--config_file", str(YAML)],
    }
    launchers["accelerate"] += ["--main_process_port", port]
    for name, command in launchers.items():
        with Launch(command, *flags(name)) as launch:
            assert launch.wait(90) == 0, launch.output()
    assert run_ranks(train_all, 2, [flags("none")])[0][0].code == 0  # no launcher at all
    wanted = tiny.losses("none")
    assert [step for step, _ in wanted] == list(range(1, 21))
    for name in launchers:
        assert tiny.losses(name) == wanted, name

    # and goes on in new processes, which know nothing of the old ones
    shutil.rmtree(tiny.checkpoint("torchrun", 20))
    (outcome,) = run_ranks(train_all, 2, [[*flags("torchrun"), "--resume", "auto"]])[0]
    assert outcome.code == 0 and "at step 10" in outcome.output
    assert tiny.losses("torchrun") == wanted


@pytest.fixture(scope="module")
def plain(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run of the plain engine in one process."""
    tiny = Tiny(tmp_path_factory.mktemp("plain"), small_data)
    flags = ("--set=train.engine=plain", *TO_THE_END)
    ds = tiny.ds(**PER_SAMPLE, zero_optimization={"stage": 0})
    assert run_ranks(train_all, 1, [tiny.flags("run", *flags, ds=ds)])[0][0].code == 0
    return tiny


TO_THE_END = ("--steps=12", "--set=eval.every=3", "--set=eval.batches=2", "--set=sample.tokens=40")
TO_THE_END += ("--set=sample.temperature=1", "--set=model.n_head=4")  # at 0 it writes "aaaa"


def valid_losses(tiny: Tiny) -> dict[int, float]:
    """Step -> validation loss."""
    lines = (tiny.path("run") / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["valid_loss"] for r in map(json.loads, lines) if "valid_loss" in r}


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_run(tiny: Tiny, plain: Tiny, name: str) -> None:
    ranks, changes, grid = LAYOUTS[name]
    flags = tiny.flags("run", *grid, *TO_THE_END, ds=tiny.ds(**PER_SAMPLE, **changes))
    outcome = run_ranks(train_all, ranks, [flags])[0][0]
    assert outcome.code == 0, outcome.error
    wanted = plain.losses("run")
    assert [step for step, _ in wanted] == list(range(1, 13)) and wanted[0][1] > wanted[-1][1]
    assert dict(tiny.losses("run")) == pytest.approx(dict(wanted), rel=1e-5)
    assert list(valid_losses(plain)) == [0, 3, 6, 9, 12]
    assert valid_losses(tiny) == pytest.approx(valid_losses(plain), rel=1e-5)
    text = (plain.path("run") / "sample.txt").read_text()
    assert len(text) > 35 and (tiny.path("run") / "sample.txt").read_text() == text
