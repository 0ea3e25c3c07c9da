"""torchrun, deepspeed and accelerate, with the shipped files: the same 20 losses on 2 ranks."""

from __future__ import annotations

import shutil

import pytest

from tests.distributed import ROOT, free_port, run_ranks
from tests.launched import Launch
from tests.tiny import Tiny, train_all

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
    with Launch(launchers["torchrun"], *flags("torchrun"), "--resume", "auto") as launch:
        assert launch.wait(90) == 0, launch.output()
        assert "at step 10" in launch.output()
    assert tiny.losses("torchrun") == wanted
