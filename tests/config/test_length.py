"""train.tokens and train.epochs in place of train.steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fgpt.config.resolve import Resolved, examine, resolve
from tests.run_flags import parse_run_flags

AUTO = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": 2},
}


def resolved(*flags: str, ds: dict[str, object] = AUTO, world: int = 2) -> Resolved:
    request = replace(parse_run_flags(["--ds_config", "ds.json", *flags]), deepspeed=ds)
    return resolve(request, world=world, device="cpu")


def errors(*flags: str) -> list[str]:
    request = replace(parse_run_flags(["--ds_config", "ds.json", *flags]), deepspeed=AUTO)
    found = examine(request, world=2, device="cpu").issues
    assert all(issue.edits for issue in found if issue.grade == "error")
    return [str(issue) for issue in found if issue.grade == "error"]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--tokens", "20480"), 10),  # 8 samples of 256 tokens
        (("--tokens", "20481"), 11),
        (("--tokens", "1"), 1),
        (("--tokens", "20480", "--set", "data.seq_len=128"), 20),
        (("--tokens", "20480", "--global_batch", "16"), 5),
        (("--set", "train.tokens=2e4"), 10),
    ],
)
def test_tokens(flags: tuple[str, ...], steps: int) -> None:
    found = resolved(*flags)
    assert found.run.train.steps == steps
    assert found.origins["run.train.steps"].startswith("derived: train.tokens / ")
    # the schedule is as long as the run
    assert found.deepspeed["scheduler"]["params"]["total_num_steps"] == steps


def test_tokens_by_a_batch_ramp() -> None:
    """Two steps of 4 samples of 256 tokens, then 8."""
    ramp = ("--set", "train.batch_ramp=0:4,2:8", "--micro_batch", "2")
    for tokens, steps in ((2048, 2), (2049, 3), (2048 + 3 * 2048, 5)):
        found = resolved("--tokens", str(tokens), *ramp)
        assert found.run.train.steps == steps
        how = found.origins["run.train.steps"]
        assert how == "derived: train.tokens / the tokens per step of train.batch_ramp"


def test_the_jsons_total_num_steps_does_not_count_then() -> None:
    params = {"total_num_steps": 5000, "warmup_num_steps": 10}
    ds = {**AUTO, "scheduler": {"type": "WarmupCosineLR", "params": params}}
    assert resolved(ds=ds).run.train.steps == 5000
    assert resolved("--tokens", "20480", ds=ds).run.train.steps == 10


def test_epochs(small_data: Path) -> None:
    from fgpt.data.card import load_card

    tokens = load_card(small_data).splits["train"].tokens
    for epochs in (0.5, 3):
        found = resolved("--data", str(small_data), "--epochs", str(epochs))
        assert found.run.train.steps == -(-int(epochs * tokens) // 2048)


def test_what_cannot_be(small_data: Path, tmp_path: Path) -> None:
    (both,) = errors("--tokens", "1e6", "--steps", "5")
    assert "train.tokens 1000000.0 and train.steps 5 -> write one of them" in both
    (both,) = errors("--tokens", "1e6", "--epochs", "2")
    assert "train.tokens 1000000.0 and train.epochs 2.0" in both
    for data in (f"{tmp_path}/missing", f"{small_data}:0.5,{small_data}x:0.5"):
        (unknown,) = errors("--epochs", "2", "--data", data)
        assert "a blend or not prepared yet -> prepare one data set first" in unknown
