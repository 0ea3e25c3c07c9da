"""Leaving samples out: exact resumes at any layout, and what a resume may change."""

from __future__ import annotations

import re

import pytest

from fgpt.checkpoint.manifest import read_manifest
from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all, zero

pytestmark = pytest.mark.dist

KEEP = ("--set=checkpoint.every=1", "--set=checkpoint.keep=9")
SKIP = "--set=data.skip_samples={}"
RAMP = "--set=train.batch_ramp=0:4,2:8"
SEEN = [0, 4, 15, 25, 33, 41, 49]
"""The position after each step of 4, 4, 8, ... samples without 5-11 and 17-18."""


@pytest.mark.timeout(120)
def test_skipped_samples_are_resumed_exactly(tiny: Tiny) -> None:
    ds = {n: tiny.ds(f"zero{n}", **zero(n), train_batch_size=8) for n in (2, 3)}
    skip = SKIP.format("17-18,5-11")

    def resumed(name: str, run: str, step: int, *more: str, stage: int = 2) -> list[str]:
        resume = ("--resume", tiny.checkpoint(run, step))
        return tiny.flags(name, *KEEP, RAMP, *resume, *more, ds=ds[stage])

    runs = [
        tiny.flags("whole", *KEEP, RAMP, skip, ds=ds[2]),
        tiny.flags("without", *KEEP, RAMP, ds=ds[2]),
        *(resumed(f"at {step}", "whole", step, skip) for step in (1, 2, 3, 5)),
        resumed("zero3", "whole", 2, skip, stage=3),
        resumed("added", "without", 1, skip),  # the checkpoint ends with sample 3
        resumed("dropped", "whole", 2, SKIP.format("5-11")),
        resumed("allowed", "without", 2, skip, "--allow=data"),
        resumed("late", "without", 2, skip),
        resumed("forgotten", "whole", 2),
    ]
    *outcomes, late, forgotten = run_ranks(train_all, 2, runs, timeout_s=100)[0]
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes
    # 1. the samples, and what a checkpoint says of them
    assert "left out: samples 17-18,5-11" in outcomes[0].output
    for step in range(1, 7):
        manifest = read_manifest(tiny.checkpoint("whole", step))
        samples = [4, 8, 16, 24, 32, 40][step - 1]
        assert (manifest.samples_seen, manifest.tokens_seen) == (SEEN[step], 32 * samples)
    whole, without = tiny.losses("whole"), tiny.losses("without")
    assert whole[0] == without[0] and whole[1] != without[1]
    # 2. resumes: the same samples, whatever is ahead may change and is recorded
    for step in (1, 2, 3, 5):
        assert tiny.losses(f"at {step}") == whole[step:], step
    assert dict(tiny.losses("zero3")) == pytest.approx(dict(whole[2:]), rel=1e-6)
    assert tiny.losses("added") == whole[1:]
    assert "allowed to differ: data.skip_samples: None -> [[5, 11], [17, 18]]" in outcomes[7].output
    added = read_manifest(tiny.checkpoint("added", 6))
    assert added.history[-1].changes == ("data.skip_samples: None -> [[5, 11], [17, 18]]",)
    assert tiny.losses("dropped")[0][1] != whole[2][1]
    # 3. what has been read cannot be left out any more, and is not read again when allowed
    assert read_manifest(tiny.checkpoint("allowed", 3)).samples_seen == 22  # 12-16, 19-21
    assert late.code == forgotten.code == 2
    assert "data.skip_samples: checkpoint None, this run [[5, 7]]; go on as before" in late.error
    assert "--set data.skip_samples=null, let it differ with --allow data" in late.error
    advice = re.search(r"--set data\.skip_samples=\S+(?=,)", forgotten.error)
    assert advice is not None and advice[0].endswith("=5-11")
