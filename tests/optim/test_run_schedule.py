"""The run file's schedule: values by hand, and torch's schedulers as an independent twin."""

import math
from dataclasses import replace

import pytest
import torch
from torch.optim import lr_scheduler

from fgpt.config.schema import ScheduleConfig
from fgpt.optim.run_schedule import RunSchedule, rate_factor

PEAK = 3e-3
ROOT_HALF = math.sqrt(0.5)


def wsd(shape="linear", warmup=4, decay=5, total=20, floor=0.0, kind="wsd"):
    return ScheduleConfig(kind, warmup, decay, shape, floor, total)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (wsd(warmup=2, decay=3, total=8), [1 / 2, 1, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
        # from 1 to 1/2: cosines of 45, 90 and 135 degrees
        (wsd("cosine", 0, 3, 5, 0.5), [1, 1, 0.75 + ROOT_HALF / 4, 0.75, 0.75 - ROOT_HALF / 4]),
        (wsd("1-sqrt", 1, 3, 5), [1, 1, 1 / 2, 1 - ROOT_HALF, 1 - math.sqrt(3 / 4)]),
        (wsd(None, 2, 0, 4, None, "constant"), [1 / 2, 1, 1, 1]),
    ],
)
def test_factors_by_hand(schedule, factors):
    found = [rate_factor(schedule, k) for k in range(schedule.total_steps)]
    assert found == pytest.approx(factors, rel=1e-12)
    end = 1.0 if schedule.decay_steps == 0 else schedule.min_ratio
    assert [rate_factor(schedule, schedule.total_steps + k) for k in (0, 1, 99)] == [end] * 3


def twin(optimizer, schedule):
    """Of torch: the decay's scheduler begins one step before the decay, at the peak."""
    warmup, decay, floor = schedule.warmup_steps, schedule.decay_steps, schedule.min_ratio
    parts = [lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)]
    milestones = [schedule.total_steps - decay - 1]
    if milestones[0] > warmup:
        parts.append(lr_scheduler.ConstantLR(optimizer, 1.0, 1))
        milestones.insert(0, warmup)
    if schedule.decay_shape == "cosine":
        parts.append(lr_scheduler.CosineAnnealingLR(optimizer, decay + 1, PEAK * floor))
    else:
        parts.append(lr_scheduler.LinearLR(optimizer, 1.0, floor, decay + 1))
    return lr_scheduler.SequentialLR(optimizer, parts, milestones)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    "schedule",
    [
        wsd(),
        wsd("cosine", 3, 7, 30, 0.1),
        wsd("linear", 2, 1, 9, 0.25),
        wsd("cosine", 5, 25, 30, 0.1, "cosine"),
        wsd("linear", 2, 8, 10, 0.0, "linear"),
    ],
)
def test_rates_are_those_of_torchs_schedulers(schedule):
    ours, torchs = (
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK) for _ in range(2)
    )
    mine, theirs = RunSchedule(ours, schedule), twin(torchs, schedule)
    for step in range(schedule.total_steps):
        found, wanted = (o.param_groups[0]["lr"] for o in (ours, torchs))
        assert found == pytest.approx(wanted, rel=1e-9), step
        assert 0 < found <= PEAK
        mine.step()
        theirs.step()
    assert mine.last_batch_iteration == schedule.total_steps - 1


def test_each_group_keeps_its_own_peak_and_any_step_can_be_set():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.5, 0.02), strict=True)]
    optimizer = torch.optim.SGD(groups)
    schedule = RunSchedule(optimizer, wsd(warmup=4))

    def rates():
        return [group["lr"] for group in optimizer.param_groups]

    assert rates() == [0.5 / 4, 0.02 / 4]
    schedule.step(9)  # the eleventh step is next
    assert rates() == [0.5, 0.02]
    schedule.step(15)
    schedule.step()
    assert rates() == [0.5 * rate_factor(wsd(), 17), 0.02 * rate_factor(wsd(), 17)]
    assert rate_factor(wsd(), 17) == 1 - 3 / 6


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_a_longer_run_is_the_same_until_the_decay(shape):
    short, long = wsd(shape, 4, 5, 20), wsd(shape, 4, 25, 100)
    begin = 20 - 5
    assert [rate_factor(short, k) for k in range(begin)] == [
        rate_factor(long, k) for k in range(begin)
    ]
    assert rate_factor(short, begin) < rate_factor(long, begin) == 1


def group(**values):
    return {"params": [torch.nn.Parameter(torch.zeros(1))], **values}


def adam_groups():
    return [group(weight_decay=0.1), group(weight_decay=0.0)]


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("with_lr", [1 / 2, 1, 2 / 3, 1 / 3]),
        ("linear", [1, 3 / 4, 1 / 2, 1 / 4]),
    ],
)
def test_weight_decay_by_hand(kind, factors):
    """The groups without weight decay keep 0."""
    config = replace(wsd(warmup=2, decay=2, total=4), weight_decay=kind)
    optimizer = torch.optim.AdamW(adam_groups())
    schedule = RunSchedule(optimizer, config)
    for factor in factors:
        decays = [g["weight_decay"] for g in optimizer.param_groups]
        assert decays == pytest.approx([0.1 * factor, 0.0])
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        schedule.step()
    assert optimizer.param_groups[0]["weight_decay"] == (0.1 if kind == "constant" else 0)


def test_momentum_by_hand():
    config = replace(wsd(warmup=0), momentum_warmup_steps=4, momentum_start=0.85)
    expected = [0.85, 0.875, 0.9, 0.925, 0.95, 0.95]
    sgd = torch.optim.SGD([group()], momentum=0.95)
    adam = torch.optim.AdamW(adam_groups(), betas=(0.95, 0.99))
    both = torch.optim.SGD([group(), group()], momentum=0.95)
    del both.param_groups[1]["momentum"]  # as Muon's, beside which Adam keeps its betas
    both.param_groups[1]["betas"] = (0.8, 0.9)
    schedules = [RunSchedule(optimizer, config) for optimizer in (sgd, adam, both)]
    for value in expected:
        assert sgd.param_groups[0]["momentum"] == pytest.approx(value, rel=1e-12)
        for each in adam.param_groups:
            assert each["betas"] == (pytest.approx(value, rel=1e-12), 0.99)
        assert both.param_groups[0]["momentum"] == pytest.approx(value, rel=1e-12)
        assert both.param_groups[1]["betas"] == (0.8, 0.9)
        for schedule in schedules:
            schedule.step()
    assert sgd.param_groups[0]["momentum"] == 0.95  # its own, to the bit
