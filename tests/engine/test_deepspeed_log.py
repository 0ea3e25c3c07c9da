"""DeepSpeed prints what the JSON requests, and nothing else."""

from __future__ import annotations

import re

import pytest

from tests.ranks import start_trainer
from tests.tiny import Tiny


@pytest.mark.dist
def test_breakdowns_and_communication_are_printed(tiny: Tiny) -> None:
    ds = tiny.ds(
        steps_per_print=1,
        wall_clock_breakdown=True,
        comms_logger={"enabled": True, "verbose": True, "prof_all": True},
    )
    few = ("--steps", 2, "--set=eval.every=1", "--set=eval.batches=20")
    with start_trainer(2, *tiny.flags("loud", *few, ds=ds)) as loud:
        assert loud.wait() == [0, 0], loud.output()
        said = loud.output(0)
    assert "step=2, skipped=0" in said and "bwd_microstep" in said and "comm op" in said
    # the parts of a step take no longer than the step; an evaluation before it is no part
    parts = re.findall(r"\| fwd: ([\d.]+) \| bwd: ([\d.]+) .* step: ([\d.]+)", said)
    assert len(parts) == 2
    for printed, record in zip(parts, tiny.records("loud"), strict=True):
        share = sum(map(float, printed)) / 1000 / record["step_s"]
        assert 0.2 < share < 1.05, (printed, record)
    with start_trainer(2, *tiny.flags("quiet", "--steps", 2)) as quiet:
        assert quiet.wait() == [0, 0], quiet.output()
        assert "INFO" not in quiet.output() and "WARNING" not in quiet.output()
