"""Splits are written while parts are still being made: in order, and removed after an error."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from fgpt.data.shards import ShardInfo
from fgpt.errors import DataError
from fgpt.prepare.assemble import SplitWriterThread
from fgpt.prepare.parts import ShardPart
from fgpt.prepare.sources.corpus import ReadStats


def part(number: int) -> ShardPart:
    return ShardPart(number, ReadStats())


def test_parts_come_in_their_order_and_early() -> None:
    seen: list[int] = []

    def write(parts: Iterable[ShardPart]) -> dict[str, ShardInfo]:
        seen.extend(part.number for part in parts)
        return {}

    with SplitWriterThread(write) as merging:
        for number in (2, 0, 3):
            merging.add(part(number))
        deadline = time.monotonic() + 10
        while seen != [0] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert seen == [0]
        merging.add(part(1))
        assert merging.result() == {}
    assert seen == [0, 1, 2, 3]


def test_what_writing_raised_is_raised_with_the_next_part() -> None:
    def write(parts: Iterable[ShardPart]) -> dict[str, ShardInfo]:
        next(iter(parts))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), SplitWriterThread(write) as merging:
        for number in range(10_000):
            merging.add(part(number))
            time.sleep(0.001)


def test_leaving_early_aborts() -> None:
    ended: list[str] = []

    def write(parts: Iterable[ShardPart]) -> dict[str, ShardInfo]:
        try:
            list(parts)
        except DataError as error:
            ended.append(str(error))
            raise
        return {}

    with pytest.raises(KeyboardInterrupt), SplitWriterThread(write) as merging:
        merging.add(part(0))
        raise KeyboardInterrupt
    assert ended == ["preparation was aborted"]
