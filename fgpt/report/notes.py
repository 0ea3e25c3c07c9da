"""Sentences under the tables: units, what was not measured and why, where figures come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fgpt.report.cells import SAMPLES
from fgpt.report.records import Figures, Record

UNITS = (
    f"Times are for {SAMPLES} samples, as in the published tables: {SAMPLES} / SPS x 1000, median"
    " over the rounds (lowest-highest round). SPS: samples of all ranks over the time they took."
    " GB: 2^30 bytes, as there (torch's max_memory_allocated / 1024^3)."
)
EFFICIENCY = (
    "On GPUs efficiency is the speed of N ranks / (N x the speed of one). On a CPU whose ranks"
    " share the cores N ranks have no more to compute with than one: there the honest figure is the"
    " speed of N ranks / the speed of one process that uses all cores, and 100% is its ideal."
)
SENT = (
    "MB sent (10^6 bytes): per step, by the rank that sends most, by kind of group. Shares are of a"
    " step's time, mean over the ranks; pipeline: a stage waits for another."
)


def notes_of(records: Sequence[Record]) -> list[str]:
    """What a full table needs to be understood and to be doubted."""
    return [UNITS, *memory_notes(records), *mfu_notes(records), *states(records), *origins(records)]


def states(records: Iterable[Record]) -> list[str]:
    """Scenarios without figures to rely on, those of one reason in one sentence."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for record in records:
        if record.state != "measured":
            key = record.state, (record.why or "no reason recorded").rstrip(".")
            reasons.setdefault(key, {}).setdefault(record.env_name, []).append(record.row)
    return [
        f"{'WRONG' if state == 'wrong' else state.capitalize()} ({why}):"
        f" {'; '.join(f'{name} of {_list(rows)}' for name, rows in names.items())}."
        for (state, why), names in reasons.items()
    ]


def memory_notes(records: Iterable[Record]) -> list[str]:
    """What of it was counted."""
    what = _distinct(figures.memory_what for figures in _figures(records))
    return [f"Memory: {'; '.join(what)}."] if what else []


def mfu_notes(records: Sequence[Record]) -> list[str]:
    """The formula, and the peaks that it was used with."""
    peaks = _distinct(
        f"{figures.peak_tflops:.4g} TFLOP/s ({figures.peak_source})"
        for figures in _figures(records)
        if figures.peak_tflops
    )
    if not peaks:
        return []
    formula = "MFU: tokens/s x FLOPs per token / (peak x ranks), attention counted in full"
    return [f"{formula}; peak: {'; '.join(peaks)}."]


def origins(records: Iterable[Record]) -> list[str]:
    """When and with what it was measured."""
    lines = []
    for record in records:
        origin = record.origin
        if not record.figures or not origin:
            continue
        changed = " with uncommitted changes" if origin.get("uncommitted_changes") else ""
        lines.append(
            f"Measured {str(origin.get('time_utc'))[:10]} at commit"
            f" {str(origin.get('commit'))[:10]}{changed}, torch"
            f" {(origin.get('versions') or {}).get('torch')}, {origin.get('threads')} thread(s), by"
            f" {' '.join(origin.get('command') or [])}."
        )
    return _distinct(lines)


def added(records: Iterable[Record]) -> list[str]:
    """What each rung is, one line each."""
    return _distinct(f"{record.env_name}: {record.adds}" for record in records if record.adds)


def _figures(records: Iterable[Record]) -> Iterator[Figures]:
    return (record.figures for record in records if record.figures is not None)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
