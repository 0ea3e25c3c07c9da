"""train.max_loss_jump: the run ends before a checkpoint has the step, and its advice works."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fgpt.checkpoint.manifest import read_manifest
from fgpt.cli import main
from fgpt.engine.base import StepResult
from fgpt.errors import BadBatchError
from fgpt.train.loss_jump import LOSSES_IN_MEAN, LossJumpGuard
from tests.ranks import ROOT, run_ranks
from tests.tiny import Tiny, train_all
from tests.train.test_hooks import BATCHES, SKIPPED, event


def jump_guard(losses: Sequence[float], **more: Any) -> LossJumpGuard:
    return LossJumpGuard(BATCHES, 1.5, losses, lambda: Path("step_20"), **more)


def test_a_jump_of_the_loss_ends_the_run() -> None:
    hook = jump_guard([9.0])
    for step in range(1, LOSSES_IN_MEAN + 1):  # 9.0 counts no more
        hook(event(step, StepResult(2.0 + step % 2, 1.0, 0.1, skipped=False)))
    hook(event(21, SKIPPED))  # has no loss
    hook(event(22, StepResult(3.9, 1.0, 0.1, skipped=False)))  # 1.4 above the mean, now 2.545
    with pytest.raises(BadBatchError) as error:
        hook(event(23, StepResult(4.1, 1.0, 0.1, skipped=False)))
    assert (error.value.step, error.value.samples) == (22, (88, 91))
    assert str(error.value) == (
        "step 23: the loss 4.1000 is more than 1.5 above the mean 2.5450 of the 20 steps before"
        " (train.max_loss_jump); samples 88-88,91-91; newest checkpoint before it: step_20;"
        " continue without them with --resume auto --set data.skip_samples=88-88,91-91, or raise"
        " train.max_loss_jump"
    )


def test_a_jump_names_what_is_left_out_already() -> None:
    hook = jump_guard([2.0] * LOSSES_IN_MEAN, skipped=[(4, 6), (90, 90)])
    with pytest.raises(BadBatchError, match=r"data.skip_samples=4-6,88-88,90-91, or"):
        hook(event(23, StepResult(4.0, 1.0, 0.1, skipped=False)))


def test_fewer_losses_have_no_mean() -> None:
    hook = jump_guard([2.0] * (LOSSES_IN_MEAN - 1))
    hook(event(1, StepResult(9.0, 1.0, 0.1, skipped=False)))


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_jump_of_the_loss_ends_the_run_on_all_ranks(tiny: Tiny) -> None:
    """The 20 losses before it are read again after a resume: the same step ends the run. Weights
    that hardly change give losses that go up and down.
    """
    limit = "--set=train.max_loss_jump=1e-9"
    flags = ("--steps=40", "--lr=1e-9", "--set=checkpoint.every=10")
    runs = [
        tiny.flags("run", *flags, limit),
        tiny.flags("run", *flags, limit, "--resume", "auto"),
        tiny.flags("whole", *flags),
    ]
    first, again, whole = zip(*run_ranks(train_all, 2, runs), strict=True)
    assert [outcome.code for outcome in (*first, *again, *whole)] == [1, 1, 1, 1, 0, 0]
    assert first[0].error == first[1].error == again[0].error == again[1].error
    # 1. the first step after 20 whose loss is above their mean, and no checkpoint of it
    losses = [loss for _, loss in tiny.losses("whole")]
    step = next(s for s in range(21, 41) if losses[s - 1] - sum(losses[s - 21 : s - 1]) / 20 > 1e-9)
    samples = f"{(step - 1) * 4}-{step * 4 - 1}"
    assert (
        f"step {step}: the loss {losses[step - 1]:.4f} is more than 1e-09 above" in first[0].error
    )
    newest = (step - 1) // 10 * 10
    assert f"samples {samples}; newest checkpoint before it: {tiny.checkpoint('run', newest)};" in (
        first[0].error
    )
    assert max(tiny.checkpoints("run")) == f"step_{newest:08d}"
    # 2. the advice: that step takes the next samples instead
    advice = re.search(r"--resume auto (--set data\.skip_samples=\S+), or", first[0].error)
    assert advice is not None and advice[1].endswith(f"={samples}")
    more = (*flags, "--resume", "auto", *advice[1].split())
    followed = run_ranks(train_all, 2, [tiny.flags("run", *more)])[0][0]
    assert followed.code == 0, followed.error
    assert tiny.losses("run")[: step - 1] == tiny.losses("whole")[: step - 1]
    assert read_manifest(tiny.checkpoint("run", 40)).samples_seen == 41 * 4


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_supervised_run_goes_on_without_the_batch(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of one jump, whose limit lies between the largest and the next one of an unlimited run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ("--steps=40", "--lr=1e-9", "--set=checkpoint.every=10")
    assert run_ranks(train_all, 1, [tiny.flags("whole", *flags)])[0][0].code == 0
    losses = [loss for _, loss in tiny.losses("whole")]
    jumps = {losses[s] - sum(losses[s - 20 : s]) / 20: s for s in range(20, 40)}
    second, largest = sorted(jumps)[-2:]
    step = jumps[largest]
    script = [sys.executable, str(ROOT / "launchers" / "train.py")]
    limit = f"--set=train.max_loss_jump={(second + largest) / 2}"
    options = ["--max-restarts=4", "--skip_bad_batches=1"]
    code = main(["train", *options, "--", *script, *tiny.flags("run", *flags, limit)])
    said = capfd.readouterr().out
    assert code == 0, said
    batch = f"{step * 2}-{step * 2 + 1}"
    assert f"failed after step {step + 1}, exit code 1: rank 0, " in said
    assert f"leaving out samples {batch}" in said
    report = json.loads((tiny.path("run") / "supervisor.json").read_text())
    assert report["restarts"] == 2 and len(report["skipped_batches"]) == 1
    manifest = read_manifest(tiny.checkpoint("run", 40))
    assert manifest.samples_seen == 41 * 2
    assert f"data.skip_samples: None -> [[{step * 2}, {step * 2 + 1}]]" in str(manifest.history)
