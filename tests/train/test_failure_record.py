"""failures.jsonl: whole lines from several processes, and tolerant reading."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fgpt.distributed.launch import World
from fgpt.train.failure_record import (
    FAILURES,
    LOST_RANK,
    FailureRecord,
    append_failure,
    cause,
    read_failures,
)
from tests.ranks import run_ranks

RECORD = FailureRecord(100.0, 1, 12, "backward", "no memory", 1, (96, 97), "checkpoints/step_10")


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    records = [RECORD, replace(RECORD, time=101.5, rank=0, samples=None, checkpoint=None)]
    for record in records:
        append_failure(tmp_path, record)
    assert read_failures(tmp_path) == records
    assert read_failures(tmp_path, since=101.5) == records[1:]
    line = json.loads((tmp_path / FAILURES).read_text().splitlines()[0])
    assert line == {
        "time": 100.0,
        "rank": 1,
        "step": 12,
        "phase": "backward",
        "error": "no memory",
        "exit_code": 1,
        "samples": [96, 97],
        "checkpoint": "checkpoints/step_10",
    }


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    whole = json.dumps(asdict(RECORD)).encode()
    lines = [b"", b"[1]", b"{}", b"\xff\xfe", b"[" * 100_000, whole.replace(b"100.0", b'"now"')]
    (tmp_path / FAILURES).write_bytes(b"\n".join([*lines, whole, whole[:-9]]))
    assert read_failures(tmp_path) == [RECORD]
    append_failure(tmp_path, RECORD)  # behind a torn line, it still is a line of its own
    assert read_failures(tmp_path) == [RECORD, RECORD]


def test_no_file_has_no_records_and_a_link_is_not_followed(tmp_path: Path) -> None:
    assert read_failures(tmp_path) == []
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    (tmp_path / FAILURES).symlink_to(outside)
    assert read_failures(tmp_path) == []
    with pytest.raises(OSError):
        append_failure(tmp_path, RECORD)
    assert outside.read_text() == "mine\n"


def append_many(world: World, run_dir: Path) -> None:
    for step in range(50):
        samples = tuple(range(2000))
        append_failure(run_dir, replace(RECORD, rank=world.rank, step=step, samples=samples))


@pytest.mark.dist
def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    run_ranks(append_many, 4, tmp_path)
    found = {(record.rank, record.step) for record in read_failures(tmp_path)}
    assert found == {(rank, step) for rank in range(4) for step in range(50)}


def test_the_cause_is_not_a_rank_that_noticed_another_ones_end() -> None:
    noticed = replace(
        RECORD, time=99.0, rank=0, error=f"after step 12: {LOST_RANK} (Connection closed by peer)"
    )
    assert cause([noticed, replace(RECORD, time=103.0), RECORD]) == RECORD
    assert cause([noticed]) == noticed  # the other one was killed and wrote nothing
    assert cause([]) is None
