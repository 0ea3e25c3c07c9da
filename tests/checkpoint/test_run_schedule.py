"""Resuming in the middle of a run-file schedule, and extending a run from its constant part."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks
from tests.tiny import Outcome, Tiny, train_all, zero

pytestmark = pytest.mark.dist

SHORT = ("--set=schedule.decay_steps=2", "--steps", 6)  # the decay begins after step 4
LONG = ("--set=schedule.decay_steps=3", "--steps", 10)
WSD = ("--set=schedule.kind=wsd", "--set=schedule.warmup_steps=3", "--set=checkpoint.keep=9")
WSD += ("--set=checkpoint.every=1",)
WSD += ("--set=schedule.momentum_warmup_steps=5", "--set=schedule.weight_decay=with_lr")
PLAIN = ("--set=train.engine=plain",)


def trained(tiny: Tiny, ranks: int, runs: dict[str, tuple[object, ...]]) -> dict[str, Outcome]:
    """Train runs with these flags one after the other; ZeRO-2, but for runs named zero3."""
    flags = []
    for run, more in runs.items():
        stage = 3 if run.startswith("zero3") else 2
        ds = tiny.ds(f"{stage} {ranks}", **zero(stage), train_batch_size=8)
        flags.append(tiny.flags(run, *WSD, *more, ds=ds))
    outcomes = run_ranks(train_all, ranks, flags)[0]
    assert [outcome.code for outcome in outcomes] == [0] * len(runs), outcomes
    return dict(zip(runs, outcomes, strict=True))


def numbers(tiny: Tiny, run: str, after: int = 0) -> list[tuple[int, float, float]]:
    """(step, loss, rate) of the steps after one."""
    found = [(r["step"], r["loss"], r["learning_rate"]) for r in tiny.records(run)]
    return [record for record in found if record[0] > after]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("ranks", "more"), [(2, ()), (1, PLAIN)], ids=["zero2", "plain"])
def test_a_run_is_resumed_and_extended_exactly(
    tiny: Tiny, ranks: int, more: tuple[str, ...]
) -> None:
    def resume(step: int) -> tuple[object, ...]:
        return ("--resume", tiny.checkpoint("short", step), *more)

    runs: dict[str, tuple[object, ...]] = {"short": (*SHORT, *more), "long": (*LONG, *more)}
    runs |= {f"at {step}": (*SHORT, *resume(step)) for step in (1, 3, 5)}
    runs |= {f"from {step}": (*LONG, *resume(step)) for step in (2, 4, 5)}
    if ranks == 2:
        runs["zero3"] = (*SHORT, *resume(3))
    said = trained(tiny, ranks, runs)
    # 1. in the warm-up, the constant part and the decay
    short, long = numbers(tiny, "short"), numbers(tiny, "long")
    assert [rate for *_, rate in short] == pytest.approx(
        [0.01 * f for f in (1 / 3, 2 / 3, 1, 1, 1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5)]
    )
    for step in (1, 3, 5):
        assert numbers(tiny, f"at {step}") == short[step:], step
        assert "schedule" not in said[f"at {step}"].output
    # 2. extended from before the decay: the longer run, bit for bit
    assert short[:4] == long[:4] and short[4] != long[4]
    for step in (2, 4):
        assert numbers(tiny, f"from {step}") == long[step:], step
        assert (
            "extended from 6 to 10 steps: the schedule (wsd) is now that of 10 steps, not of 6;"
            " the learning rate goes on at 0.01"
        ) in said[f"from {step}"].output
    # 3. extended from the decay: another run, and the way to the one above
    assert numbers(tiny, "from 5")[0][2] == 0.01
    assert (
        "not of 6 (the decay began at step 4: to go on from the constant part, --resume a"
        " checkpoint of that step or an earlier one); the learning rate goes on at 0.01, it was"
        " 0.00423"
    ) in said["from 5"].output
    # 4. at another layout: the same rates
    if ranks == 2:
        for found, wanted in zip(numbers(tiny, "zero3"), short[3:], strict=True):
            assert found[2] == wanted[2] and found[1] == pytest.approx(wanted[1], rel=1e-6)
