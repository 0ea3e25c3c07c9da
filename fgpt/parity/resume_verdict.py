"""The differences between a resumed run and the uninterrupted one.

At the user's own layout everything must be equal bit for bit. Another layout adds the same numbers
in another order, so losses, norms and the final state have bounds; the learning rates, the samples
and the state as loaded must still be equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgpt.checkpoint.manifest import Manifest, read_manifest
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.config.resolve import Resolved
from fgpt.engine.state import WEIGHT, Progress
from fgpt.parity.resume_layouts import (
    INTERRUPTED,
    SAME,
    UNINTERRUPTED,
    ResumeCheck,
    Target,
    checkpoint,
)
from fgpt.parity.resume_rank import LOADED, SAMPLES
from fgpt.parity.trace import BOUNDS, relative_difference, relative_distance

KINDS = {
    "loss": "losses",
    "norm": "norms",
    "rate": "rates",
    "samples": "samples",
    "loaded": "as loaded",
    "counters": "counters",
    "weights": "weights",
    "states": "states",
}
"""What is compared -> its column in the table."""


class ResumeBounds(NamedTuple):
    """Largest relative differences that count as the same run."""

    loss: float = 0.0
    norm: float = 0.0
    tensors: float = 0.0
    """Of all weights together, and of one parameter's optimizer state, in the L2 norm."""


EXACT = ResumeBounds()
FP32 = ResumeBounds(2e-6, 2e-6, BOUNDS["fp32"].gradient)
ROUNDED = ResumeBounds(BOUNDS["bf16"].loss, BOUNDS["bf16"].norm, BOUNDS["bf16"].gradient)
"""Of runs that compute in less than float32, or keep optimizer states in 8 bits."""


def bounds_between_layouts(resolved: Resolved) -> ResumeBounds:
    """Return the bounds of another layout than the user's."""
    settings, optimizer = resolved.settings, resolved.settings.optimizer
    is_rounded = (
        resolved.precision != "fp32"
        or settings.get("torch_autocast.enabled")
        or resolved.run.speed.matmul == "fp8"
        or (optimizer is not None and "8bit" in optimizer.name.lower())
    )
    return ROUNDED if is_rounded else FP32


@dataclass
class ResumeVerdict:
    """One layout compared with the uninterrupted run."""

    layout: str
    grid: str
    bounds: ResumeBounds
    differences: dict[str, float] = field(default_factory=dict)
    """Kind -> largest relative difference; 0 where only equality counts."""
    departures: dict[str, str] = field(default_factory=dict)
    """Kind, or "run" for one that failed -> the first difference beyond its bound."""

    def add(self, kind: str, difference: float, bound: float, what: str) -> None:
        """Add a difference; `what` says of what it is."""
        self.differences[kind] = max(difference, self.differences.get(kind, 0.0))
        if difference > bound:
            limit = f"bound {bound:.0e}" if bound else "must be equal"
            self.depart(kind, f"{what}: relative difference {difference:.1e}, {limit}")

    def depart(self, kind: str, text: str) -> None:
        """Add a departure, unless this kind has one."""
        self.departures.setdefault(kind, text)


def compare(
    check: ResumeCheck, target: Target, folder: Path, failure: str | None = None
) -> ResumeVerdict:
    """Compare the run resumed at a layout with the uninterrupted one; `failure`: why it ended.

    Raises CheckpointError, OSError if a run has left no complete checkpoint.
    """
    between = bounds_between_layouts(check.same.resolved)
    bounds = EXACT if target.name == SAME else between
    verdict = ResumeVerdict(target.name, target.grid, bounds)
    if failure is not None:
        verdict.depart("run", f"the resumed run failed: {failure}")
        return verdict
    resumed, whole = folder / target.name, folder / UNINTERRUPTED
    steps = range(check.at + 1, check.steps + 1)
    _compare_metrics(verdict, _metrics(resumed), _metrics(whole), steps)
    _compare_samples(verdict, _samples(resumed), _samples(whole), steps)
    # the state as loaded, and the final one
    loaded = _open(resumed / LOADED / f"step_{check.at:08d}")
    saved = _open(checkpoint(folder / INTERRUPTED, check.at))
    _compare_counters(verdict, loaded.manifest, saved.manifest, "as loaded")
    _compare_loaded(verdict, loaded, saved)
    last, expected = (_open(checkpoint(run, check.steps)) for run in (resumed, whole))
    _compare_counters(verdict, last.manifest, expected.manifest, "at the end")
    _compare_final(verdict, last, expected)
    return verdict


def _open(path: Path) -> CheckpointReader:
    return CheckpointReader(path, read_manifest(path))


def _metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> its record in metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines) if "loss" in record}


def _compare_metrics(
    verdict: ResumeVerdict,
    resumed: Mapping[int, Mapping[str, Any]],
    whole: Mapping[int, Mapping[str, Any]],
    steps: range,
) -> None:
    bounds = {"loss": verdict.bounds.loss, "norm": verdict.bounds.norm, "rate": 0.0}
    names = {"loss": "loss", "norm": "grad_norm", "rate": "learning_rate"}
    for kind, bound in bounds.items():
        for step in steps:
            a = resumed.get(step, {}).get(names[kind], math.nan)
            b = whole[step][names[kind]]
            is_skipped = math.isnan(b) and resumed.get(step, {}).get("skipped")
            difference = 0.0 if math.isnan(a) and is_skipped else relative_difference(a, b)
            verdict.add(kind, difference, bound, f"{kind} of step {step}: {a!r}, not {b!r}")


def _samples(run_dir: Path) -> dict[int, list[tuple[int, str]]]:
    """Step -> (number, hash of the tokens) of each sample that the ranks were given, sorted.

    Ranks of one data rank share its samples; where they differ, all are listed.
    """
    parts: dict[int, set[tuple[int, tuple[tuple[int, str], ...]]]] = {}
    for file in run_dir.glob(SAMPLES.format(0).replace("0", "?")):
        value = json.loads(file.read_text())
        for step, rows in value["steps"].items():
            part = tuple((number, tokens) for number, tokens in rows)
            parts.setdefault(int(step), set()).add((value["data_rank"], part))
    return {step: sorted(row for _, rows in found for row in rows) for step, found in parts.items()}


def _compare_samples(
    verdict: ResumeVerdict,
    resumed: Mapping[int, list[tuple[int, str]]],
    whole: Mapping[int, list[tuple[int, str]]],
    steps: range,
) -> None:
    verdict.differences["samples"] = 0.0
    for step in steps:
        a, b = resumed.get(step, []), whole[step]
        if a == b:
            continue
        ids, expected = ([number for number, _ in rows] for rows in (a, b))
        text = f"step {step} read the samples {_ranges(ids)}, not {_ranges(expected)}"
        if ids == expected:
            other = next(x for x, y in zip(a, b, strict=True) if x != y)[0]
            text = f"step {step} read other tokens as sample {other}"
        verdict.depart("samples", text)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 8-11, 15."""
    texts = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        texts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(texts) or "none"


def _compare_counters(verdict: ResumeVerdict, a: Manifest, b: Manifest, when: str) -> None:
    verdict.differences["counters"] = 0.0
    values = [_counters(manifest) for manifest in (a, b)]
    for name in values[0].keys() & values[1].keys():
        mine, expected = (counters[name] for counters in values)
        if mine != expected:
            verdict.depart("counters", f"{name} {when}: {mine}, not {expected}")


def _counters(manifest: Manifest) -> dict[str, Any]:
    progress: Progress = manifest.progress
    counters = {name: value for name, value in vars(progress).items() if value is not None}
    return counters | {"samples_seen": manifest.samples_seen, "tokens_seen": manifest.tokens_seen}


def _pairs(
    verdict: ResumeVerdict, kind: str, a: CheckpointReader, b: CheckpointReader, states: bool
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield (parameter, state, values in a, values in b), of the weights or of the states."""
    for name, record in b.manifest.tensors.items():
        mine = a.manifest.tensors[name].states if name in a.manifest.tensors else {}
        for state in sorted(mine.keys() ^ record.states.keys()):
            side = "missing" if state in record.states else "not expected"
            verdict.depart(kind, f"{state} of {name} is {side}")
        for state in sorted(mine.keys() & record.states.keys()):
            if (state != WEIGHT) == states:
                yield name, state, a.read(name, state), b.read(name, state)


def _are_bitwise_equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:  # the plain engine keeps 16-bit states in 32
        a, b = a.float(), b.float()
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _compare_loaded(verdict: ResumeVerdict, a: CheckpointReader, b: CheckpointReader) -> None:
    """Compare the state right after loading with the checkpoint; 8-bit states are rounded anew."""
    for is_state in (False, True):
        for name, state, mine, saved in _pairs(verdict, "loaded", a, b, is_state):
            dtype = b.manifest.tensors[name].states[state]
            bound = verdict.bounds.tensors if dtype == "U8" else 0.0
            _add_tensors(verdict, "loaded", mine, saved, bound, f"{state} of {name} as loaded")


def _compare_final(verdict: ResumeVerdict, a: CheckpointReader, b: CheckpointReader) -> None:
    bound = verdict.bounds.tensors
    for name, state, mine, expected in _pairs(verdict, "states", a, b, states=True):
        _add_tensors(verdict, "states", mine, expected, bound, f"{state} of {name} at the end")
    if bound == 0:
        for name, state, mine, expected in _pairs(verdict, "weights", a, b, states=False):
            _add_tensors(verdict, "weights", mine, expected, bound, f"{state} of {name} at the end")
        return
    # all weights together: the gradient of a key's bias is zero but for rounding errors, which Adam
    # scales up, so that one tensor's weights may differ though the runs are the same
    squares, total = {}, 0.0
    for name, _, mine, expected in _pairs(verdict, "weights", a, b, states=False):
        squares[name] = float((mine.double() - expected.double()).square().sum())
        total += float(expected.double().square().sum())
    difference = math.sqrt(sum(squares.values()) / total)
    largest = max(squares, key=lambda name: squares[name])
    difference = math.inf if math.isnan(difference) else difference
    verdict.add("weights", difference, bound, f"weights at the end, most of all {largest}")


def _add_tensors(
    verdict: ResumeVerdict, kind: str, a: Tensor, b: Tensor, bound: float, what: str
) -> None:
    if _are_bitwise_equal(a, b):
        verdict.add(kind, 0.0, bound, what)
        return
    difference = relative_distance(a.float(), b.float())
    verdict.add(kind, difference, bound, what)
    if bound == 0:
        verdict.depart(kind, f"{what}: differs in its bits")
