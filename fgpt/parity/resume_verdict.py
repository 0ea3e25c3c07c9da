"""The differences between a resumed run and the uninterrupted one.

At the user's own layout everything must be equal bit for bit. Another layout adds the same numbers
in another order, so losses, norms and the final state have bounds; the learning rates, the samples
and the state as loaded must still be equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgpt.checkpoint.manifest import Manifest, read_manifest
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.config.resolve import Resolved
from fgpt.config.schema import ModelConfig, Shapes
from fgpt.engine.state import WEIGHT
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


Pair = tuple[str, str, Tensor, Tensor]
"""Parameter, state, the resumed run's values, the expected ones."""


class ResumeBounds(NamedTuple):
    """Largest relative differences that count as the same run."""

    loss: float = 0.0
    norm: float = 0.0
    tensors: float = 0.0
    """Of a parameter's final weights and optimizer states, in the L2 norm; with 8-bit states, of
    all parameters together."""

    @property
    def is_exact(self) -> bool:
        """Whether every bit must be equal."""
        return self.tensors == 0


EXACT = ResumeBounds()
FP32 = ResumeBounds(2e-6, 2e-6, BOUNDS["fp32"].gradient)
ROUNDED = ResumeBounds(BOUNDS["bf16"].loss, BOUNDS["bf16"].norm, BOUNDS["bf16"].gradient)
"""Of runs that compute in less than float32."""
EIGHT_BIT = ROUNDED._replace(tensors=0.25)
"""Of optimizer states in 8 bits, which another layout rounds anew, in other blocks: a second moment
that becomes zero makes its weight's next step large."""


def bounds_between_layouts(resolved: Resolved) -> ResumeBounds:
    """Return the bounds of another layout than the user's."""
    settings, optimizer = resolved.settings, resolved.settings.optimizer
    if optimizer is not None and "8bit" in optimizer.name.lower():
        return EIGHT_BIT
    is_rounded = resolved.precision != "fp32" or settings.get("torch_autocast.enabled")
    return ROUNDED if is_rounded or resolved.run.speed.matmul == "fp8" else FP32


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
    _compare_final(verdict, last, expected, check.same.resolved.run.model)
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
    for name, mine in values[0].items():
        expected = values[1].get(name, mine)  # only fp16's engines have a loss scale
        if mine != expected:
            verdict.depart("counters", f"{name} {when}: {mine}, not {expected}")


def _counters(manifest: Manifest) -> dict[str, Any]:
    progress = vars(manifest.progress)
    counters = {name: value for name, value in progress.items() if value is not None}
    return counters | {"samples_seen": manifest.samples_seen, "tokens_seen": manifest.tokens_seen}


def _pairs(
    verdict: ResumeVerdict, kind: str, a: CheckpointReader, b: CheckpointReader, states: bool
) -> Iterator[Pair]:
    """Yield the weights, or the states."""
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
    """Compare the state right after loading with the checkpoint."""
    _compare_each(verdict, "loaded", _pairs(verdict, "loaded", a, b, states=False), 0.0)
    states = _pairs(verdict, "loaded", a, b, states=True)
    if verdict.bounds.is_exact or not (_has_8_bits(a) or _has_8_bits(b)):
        _compare_each(verdict, "loaded", states, 0.0)
    else:  # rounded anew, in other blocks
        _compare_together(verdict, "loaded", states, verdict.bounds.tensors)


def _compare_final(
    verdict: ResumeVerdict, a: CheckpointReader, b: CheckpointReader, model: ModelConfig
) -> None:
    bound = verdict.bounds.tensors
    for kind in ("weights", "states"):
        pairs = _pairs(verdict, kind, a, b, states=kind == "states")
        if verdict.bounds.is_exact:
            _compare_each(verdict, kind, pairs, bound)
            continue
        pairs = (_without_key_biases(pair, model) for pair in pairs)
        compare_them = _compare_together if _has_8_bits(a) or _has_8_bits(b) else _compare_each
        compare_them(verdict, kind, pairs, bound)


def _without_key_biases(pair: Pair, model: ModelConfig) -> Pair:
    """Leave the biases of attention's keys out.

    Every score of a query gets the same sum from them, which softmax ignores: their gradient is
    zero but for rounding errors, which Adam scales up to its full step.
    """
    name, state, a, b = pair
    if not name.endswith(".attention.qkv.bias"):
        return pair
    shapes = Shapes.of(model)
    grouped = (shapes.n_kv_head, shapes.n_head // shapes.n_kv_head + 2, shapes.d_head)  # q, k, v
    kept = [i for i in range(grouped[1]) if i != grouped[1] - 2]
    return name, state, a.view(grouped)[:, kept], b.view(grouped)[:, kept]


def _has_8_bits(reader: CheckpointReader) -> bool:
    return any("U8" in record.states.values() for record in reader.manifest.tensors.values())


def _compare_each(verdict: ResumeVerdict, kind: str, pairs: Iterable[Pair], bound: float) -> None:
    """Compare tensor by tensor; without a bound every bit must be equal."""
    for name, state, a, b in pairs:
        what = f"{state} of {name}"
        is_equal = _are_bitwise_equal(a, b)
        difference = 0.0 if is_equal else relative_distance(a.float(), b.float())
        verdict.add(kind, difference, bound, what)
        if bound == 0 and not is_equal:
            verdict.depart(kind, f"{what}: differs in its bits")


def _compare_together(
    verdict: ResumeVerdict, kind: str, pairs: Iterable[Pair], bound: float
) -> None:
    """Compare a state of all parameters as one vector: the 8-bit states of a small tensor are
    rounded by the scale of its larger neighbours in the block, and may differ by more.
    """
    squares: dict[str, dict[str, float]] = {}
    totals: dict[str, float] = {}
    for name, state, a, b in pairs:
        a, b = a.double(), b.double()
        squares.setdefault(state, {})[name] = float((a - b).square().sum())
        totals[state] = totals.get(state, 0.0) + float(b.square().sum())
    for state, of in squares.items():
        difference = math.sqrt(sum(of.values()) / (totals[state] or 1.0))
        difference = math.inf if math.isnan(difference) else difference
        largest = max(of, key=lambda name: of[name])
        verdict.add(kind, difference, bound, f"{state} of all parameters, most of all {largest}")
