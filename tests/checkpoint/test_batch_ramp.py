"""Resuming in the middle of a batch ramp: the same samples, losses and numbers of tokens."""

from __future__ import annotations

import pytest

from fgpt.checkpoint.manifest import read_manifest
from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all, zero

pytestmark = pytest.mark.dist

RAMP = (
    "--set=train.batch_ramp=0:4,2:8,4:16",
    "--set=checkpoint.every=1",
    "--set=checkpoint.keep=9",
)
SEEN = [0, 4, 8, 16, 24, 40, 56]
"""Samples after each step."""


@pytest.mark.timeout(120)
def test_a_ramp_is_resumed_exactly(tiny: Tiny) -> None:
    ds = {n: tiny.ds(f"zero{n}", **zero(n), train_batch_size=16) for n in (2, 3)}
    runs = [tiny.flags("whole", *RAMP, ds=ds[2])]
    for step in (1, 2, 3, 5):
        resume = ("--resume", tiny.checkpoint("whole", step))
        runs.append(tiny.flags(f"at {step}", *RAMP, *resume, ds=ds[2]))
    resume = ("--resume", tiny.checkpoint("whole", 3))
    runs.append(tiny.flags("zero3", *RAMP, *resume, "--set=data.prefetch=0", ds=ds[3]))
    runs.append(tiny.flags("constant", *RAMP[1:], *resume, ds=ds[2]))
    runs.append(tiny.flags("allowed", *RAMP[1:], *resume, "--allow=batch", ds=ds[2]))
    *outcomes, refused, allowed = run_ranks(train_all, 2, runs)[0]
    assert [o.code for o in (*outcomes, allowed)] == [0] * 7, outcomes
    assert "global batch: 4 from step 0, 8 from step 2, 16 from step 4" in outcomes[0].output
    whole = tiny.losses("whole")
    for step in (1, 2, 3, 5):
        assert tiny.losses(f"at {step}") == whole[step:], step
    # the tokens of 32 per sample, in records and checkpoints
    assert [r["tokens"] for r in tiny.records("whole")] == [32 * n for n in SEEN[1:]]
    for run, first in (("whole", 1), ("at 3", 4)):
        for step in range(first, 7):
            manifest = read_manifest(tiny.checkpoint(run, step))
            assert (manifest.samples_seen, manifest.tokens_seen) == (SEEN[step], 32 * SEEN[step])
    # another layout; one process without DeepSpeed
    one = tiny.ds("plain", train_batch_size=16, zero_optimization={"stage": 0})
    flags = tiny.flags("plain", *RAMP, *resume, "--set=train.engine=plain", ds=one)
    assert run_ranks(train_all, 1, [flags])[0][0].code == 0
    for run in ("zero3", "plain"):
        assert dict(tiny.losses(run)) == pytest.approx(dict(whole[3:]), rel=1e-6), run
    # without the ramp
    assert refused.code == 2 and "checkpoint '0:4,2:8,4:16', this run 16" in refused.error
    assert "--set train.batch_ramp=0:4,2:8,4:16 --global_batch 16, let it" in refused.error
    assert read_manifest(tiny.checkpoint("allowed", 6)).samples_seen == SEEN[3] + 3 * 16
