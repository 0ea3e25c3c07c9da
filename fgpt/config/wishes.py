"""What a DeepSpeed JSON asks of DeepSpeed, and the run file states in FGPT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fgpt.config.deepspeed.settings import value_at
from fgpt.config.deepspeed.translate import Wish
from fgpt.config.run_file import LoadedRun, set_field
from fgpt.config.speed import compile_obstacles
from fgpt.errors import ConfigIssue, Edit, Grade
from fgpt.utils.compiler import missing_compiler
from fgpt.utils.keys import shown

_TOTAL = "scheduler.params.total_num_steps"


def grant_wishes(
    wishes: Sequence[Wish], loaded: LoadedRun, tree: Mapping[str, Any], file: str, device: str
) -> Iterator[ConfigIssue]:
    """Write the wishes into `loaded`, unless the run file or a flag says otherwise.

    Yields what became of each. The length of the schedule is a wish for as many steps.
    """
    steps = value_at(tree, _TOTAL)
    if type(steps) is int:
        wishes = [*wishes, Wish(_TOTAL, "train.steps", steps, steps)]
    for wish in wishes:
        field, where, what = wish.run_field, f"{file}: {wish.key}", shown(wish.written)
        origin = loaded.origins.get(field, "default")
        if field in loaded.invalid:
            continue
        if origin.startswith(("file ", "flag ", "derived: ")):
            if wish.key != _TOTAL:  # a rule compares it with the number of steps
                fix = f"{field} is set by {origin.partition(' ')[2]}"
                yield ConfigIssue(where, what, fix, "note")
            continue
        if wish.value == "blocks" and (reasons := _compile_obstacles(loaded, tree, device)):
            fix = f"blocks are not compiled because of {', '.join(reasons)}"
            yield ConfigIssue(where, what, fix, "warning")
            continue
        loaded.run = set_field(loaded.run, field, wish.value)
        loaded.origins[field] = f"file {file}"
        grade: Grade = "note" if wish.key == _TOTAL else "warning"
        edits = (Edit(f"run.{field}", wish.value),)
        yield ConfigIssue(where, what, f"{field} {shown(wish.value)} of the run", grade, edits)


def _compile_obstacles(loaded: LoadedRun, tree: Mapping[str, Any], device: str) -> list[str]:
    """Why the blocks cannot be compiled; empty: they can."""
    stage = value_at(tree, "zero_optimization.stage")
    reasons = list(compile_obstacles(loaded.run, stage if isinstance(stage, int) else 0))
    if device == "cpu" and (missing := missing_compiler("cpu")) is not None:
        reasons.append(missing)
    return reasons
