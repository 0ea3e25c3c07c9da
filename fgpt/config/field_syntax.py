"""The syntax of run-file fields: of data, skipped samples, partition and batch ramp.

data.path           DIR, or a mixture with weights, DIR:0.7,DIR:0.3
data.stages         TOKENS=DATA of each later stage, 8e9=DIR:0.7,DIR:0.3;9e9=DIR
data.skip_samples   FIRST-LAST of each range of sample numbers, 1000-1031,2000-2031
parallel.partition  parameters, uniform, type:NAME, or each stage's number of blocks, 3,2
train.batch_ramp    STEP:BATCH of each part of the ramp, 0:64,100:128
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from fgpt.config.schema import ModelConfig

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-9, 1e9
BY_PARAMETERS, BY_LAYERS = "parameters", "uniform"
BY_TYPE = "type:"
"""Prefix of a part of a layer's class name."""


class WeightedPath(NamedTuple):
    """One data set of a mixture."""

    path: str
    weight: Fraction
    """Relative to the other weights; they need not add up to 1."""


def parse_blend(text: str) -> list[WeightedPath]:
    """The data sets of a valid `data.path`, in its order."""
    return [WeightedPath(path, Fraction(weight or 1)) for path, weight in _split(text)]


def expand_home(text: str) -> str:
    """Expand ~ at the beginning of a path, and of each path of a blend, as shells do.

    A shell leaves it in --run_dir=~/x, in KEY=~/x and behind a comma.
    """
    return re.sub(
        r"(?:^|(?<=,))\s*~[^/,:]*(?=/|$)", lambda m: os.path.expanduser(m[0].strip()), text
    )


def blend_error(text: str) -> str:
    """Why `data.path` is invalid; an empty string if it is valid."""
    entries = list(_split(text))
    paths = [path for path, _ in entries]
    for path, weight in entries:
        if not path:
            return f"{text!r} has an entry without a directory"
        if [os.path.normpath(other) for other in paths].count(os.path.normpath(path)) > 1:
            return f"{path!r} is listed twice"
        if not weight and len(entries) > 1:
            return f"{path!r} has no weight"
        if weight and not _LEAST_WEIGHT <= float(weight) <= _MOST_WEIGHT:
            bounds = f"between {_LEAST_WEIGHT:g} and {_MOST_WEIGHT:g}"
            return f"weight {weight} of {path!r} is not {bounds}"
    return ""


def blend_text(value: list[Any]) -> str | None:
    """Return "a:0.7,b:0.3" for [{"path": "a", "weight": 0.7}, ...]; None for other lists."""
    if not all(isinstance(entry, dict) and entry.keys() == {"path", "weight"} for entry in value):
        return None
    if not all(type(entry["weight"]) in (int, float) for entry in value):
        return None
    return ",".join(f"{entry['path']}:{entry['weight']!r}" for entry in value)


def _split(text: str) -> Iterator[tuple[str, str]]:
    """(path, weight as text) of each entry; the weight is empty where there is none."""
    for entry in text.split(","):
        path, colon, weight = entry.strip().rpartition(":")
        if colon and _NUMBER.fullmatch(weight.strip()):
            yield path.strip(), weight.strip()
        else:
            yield entry.strip(), ""


class StageText(NamedTuple):
    """One entry of `data.stages`."""

    tokens: float
    """Tokens of the run before it."""
    path: str
    """As `data.path`."""


def parse_stages(text: str) -> list[StageText]:
    """The entries of a valid `data.stages`, in its order."""
    return [StageText(float(tokens), path) for tokens, path in _split_stages(text)]


def stages_error(text: str) -> str:
    """Why `data.stages` is invalid; an empty string if it is valid."""
    before = 0.0
    for tokens, path in _split_stages(text):
        if not _NUMBER.fullmatch(tokens) or not math.isfinite(float(tokens)):
            return f"{text!r} has an entry that is not TOKENS=DATA"
        if error := blend_error(path):
            return error
        if float(tokens) <= before:
            return f"the tokens of {text!r} do not ascend from more than 0"
        before = float(tokens)
    return ""


def stages_text(value: list[Any]) -> str | None:
    """Return "8e9=a:0.7,b:0.3" for [{"tokens": 8e9, "path": "a:0.7,b:0.3"}]; None for others.

    A path may be a list, as that of `data.path`.
    """
    entries = []
    for entry in value:
        if not isinstance(entry, dict) or entry.keys() != {"tokens", "path"}:
            return None
        path, tokens = entry["path"], entry["tokens"]
        path = blend_text(path) if isinstance(path, list) else path
        if not isinstance(path, str) or type(tokens) not in (int, float):
            return None
        entries.append(f"{tokens}={path}")
    return ";".join(entries) or None


def expand_stages(text: str) -> str:
    """Expand ~ at the beginning of each path of `data.stages`."""
    entries = (entry.partition("=") for entry in text.split(";"))
    return ";".join(f"{tokens}{equals}{expand_home(path)}" for tokens, equals, path in entries)


def _split_stages(text: str) -> Iterator[tuple[str, str]]:
    for entry in text.split(";"):
        tokens, _, path = entry.partition("=")
        yield tokens.strip(), path.strip()


Ranges = Sequence[tuple[int, int]]
"""(first, last) of each range of numbers, both included."""
_RANGE = re.compile(r"\s*(\d{1,18})\s*-\s*(\d{1,18})\s*", re.ASCII)


def parse_ranges(text: str) -> Ranges:
    """The ranges of a valid `data.skip_samples`, ascending, joined where they touch."""
    pairs = (_RANGE.fullmatch(entry) for entry in text.split(","))
    return joined_ranges((int(pair[1]), int(pair[2])) for pair in pairs if pair)


def joined_ranges(ranges: Iterable[Sequence[int]]) -> Ranges:
    """Ascending ranges that do not touch, of the same numbers."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted((first, last) for first, last in ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined


def ranges_error(text: str) -> str:
    """Why `data.skip_samples` is invalid; an empty string if it is valid."""
    for entry in text.split(","):
        pair = _RANGE.fullmatch(entry)
        if pair is None:
            return f"{text!r} has an entry that is not FIRST-LAST"
        if int(pair[1]) > int(pair[2]):
            return f"{entry.strip()!r} ends before it begins"
    return ""


def ranges_text(value: Sequence[Any]) -> str | None:
    """Return "1000-1031,2000-2031" for [[1000, 1031], [2000, 2031]]; None for other lists."""
    if not value or any(type(part) not in (list, tuple) or len(part) != 2 for part in value):
        return None
    if any(type(number) is not int for part in value for number in part):
        return None
    return ",".join(f"{first}-{last}" for first, last in value)


def layer_classes(model: ModelConfig) -> list[str]:
    """Class name of each layer of the GPT, in order."""
    norm = "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"
    final_norm = norm if model.norm_place == "pre" else "Identity"
    return ["InputEmbedding", *["Block"] * model.n_layer, final_norm, "Head"]


def has_type(layer_class: str, partition: str) -> bool:
    """Whether `type:NAME` selects a layer of this class; case does not matter."""
    return partition.removeprefix(BY_TYPE).strip().lower() in layer_class.lower()


def parse_blocks(partition: str) -> list[int] | None:
    """Return [3, 2] for "3,2"; None for the other partitions."""
    numbers = [number.strip() for number in partition.split(",")]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        return None
    return [int(number) for number in numbers]


def blocks_text(value: list[Any]) -> str | None:
    """Return "3,2" for [3, 2]; None for lists of anything but integers."""
    if any(type(blocks) is not int for blocks in value):
        return None
    return ",".join(map(str, value))


def parse_ramp(text: str) -> list[tuple[int, int]]:
    """Return [(0, 64), (100, 128)] for a valid `train.batch_ramp`."""
    return [(int(step), int(size)) for step, size in _split_ramp(text)]


def ramp_error(text: str) -> str:
    """Why `train.batch_ramp` is invalid; an empty string if it is valid."""
    entries = list(_split_ramp(text))
    for step, size in entries:
        if not all(number.isascii() and number.isdigit() for number in (step, size)):
            return f"{text!r} has an entry that is not STEP:BATCH"
    steps, sizes = zip(*parse_ramp(text), strict=True)
    if steps[0] != 0:
        return f"{text!r} does not begin at step 0"
    for numbers, name in ((steps, "steps"), (sizes, "batches")):
        if any(a >= b for a, b in itertools.pairwise(numbers)):
            return f"the {name} of {text!r} do not ascend"
    return "" if sizes[0] > 0 else f"{text!r} has an empty batch"


def ramp_text(value: list[Any]) -> str | None:
    """Return "0:64,100:128" for [[0, 64], [100, 128]]; None for other lists."""
    if not value or any(type(part) is not list or len(part) != 2 for part in value):
        return None
    if any(type(number) is not int for part in value for number in part):
        return None
    return ",".join(f"{step}:{size}" for step, size in value)


def _split_ramp(text: str) -> Iterator[tuple[str, str]]:
    for entry in text.split(","):
        step, _, size = entry.partition(":")
        yield step.strip(), size.strip()
