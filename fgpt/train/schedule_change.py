"""What becomes of the learning rate when a run is extended, or resumed with another schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fgpt.checkpoint.manifest import Manifest
from fgpt.config.resolve import Resolved
from fgpt.config.schema import ScheduleConfig
from fgpt.optim.optimizers import peak_rate
from fgpt.optim.run_schedule import rate_factor
from fgpt.optim.schedules import learning_rate


class _RunRates:
    """The learning rates of a run, by its config.json."""

    def __init__(self, config: Mapping[str, Any]):
        run, deepspeed = config["run"], config["deepspeed"]
        self.steps: int = run["train"]["steps"]
        self.lr = peak_rate(deepspeed["optimizer"].get("params", {}))
        self.scheduler: dict[str, Any] | None = deepspeed.get("scheduler")
        # a checkpoint of another version may lack the section, or have further fields
        names = {field.name for field in fields(ScheduleConfig)}
        own = ScheduleConfig(**{k: v for k, v in run.get("schedule", {}).items() if k in names})
        self.own = None if own.kind == "deepspeed" else own
        if self.own is not None:
            self.kind: str = self.own.kind
            self.total = self.own.total_steps
        else:
            scheduler = self.scheduler or {}
            self.kind = scheduler.get("type", "a constant rate")
            self.total = scheduler.get("params", {}).get("total_num_steps")

    def at(self, applied_steps: int) -> float:
        """The rate of the step after `applied_steps`. Raises KeyError for OneCycle."""
        if self.own is not None:
            return self.lr * rate_factor(self.own, applied_steps)
        return learning_rate(self.scheduler, self.lr, applied_steps)

    @property
    def decay_begin(self) -> int | None:
        """The applied steps at which wsd's decay begins; None: another schedule."""
        if self.own is None or self.own.kind != "wsd":
            return None
        assert self.total is not None and self.own.decay_steps is not None  # resolved
        return self.total - self.own.decay_steps


def schedule_change(resolved: Resolved, manifest: Manifest) -> str:
    """One line if the run is longer than the checkpoint's, or its schedule another; else nothing.

    With the rates of the last step and of the next one, and how to have it the other way.
    """
    if not {"run", "deepspeed"} <= manifest.config.keys():
        return ""
    before, now = _RunRates(manifest.config), _RunRates(resolved.to_json())
    is_same = (before.own, before.scheduler) == (now.own, now.scheduler)
    if (is_same and now.steps <= before.steps) or manifest.step >= now.steps:
        return ""
    applied = manifest.step - manifest.progress.skipped_steps
    try:
        old, new = before.at(max(applied - 1, 0)), now.at(applied)
    except KeyError:  # OneCycle: DeepSpeed alone computes it
        return ""
    if is_same:
        what = f"the schedule stays as it was ({now.kind})"
    elif before.kind == now.kind and before.total != now.total:
        what = f"the schedule ({now.kind}) is now that of {now.total} steps, not of {before.total}"
    elif before.kind == now.kind:
        what = f"the schedule ({now.kind}) has other values"
    else:
        what = f"the schedule is {now.kind}, it was {before.kind}"
    longer = other = ""
    if now.steps > before.steps:
        longer = f"extended from {before.steps} to {now.steps} steps: "
        other = _other_way(before, now, applied, is_same)
    return f"{longer}{what}{other}; the learning rate goes on at {new:.3g}, it was {old:.3g}"


def _other_way(before: _RunRates, now: _RunRates, applied: int, is_same: bool) -> str:
    """How an extended run has the other schedule: the old one, or one as long as the run."""
    begin = before.decay_begin
    if begin is not None and applied > begin:
        return (
            f" (the decay began at step {begin}: to go on from the constant part, --resume a"
            " checkpoint of that step or an earlier one)"
        )
    if now.own is not None or now.total is None:
        return ""
    flag = "--ds_set scheduler.params.total_num_steps"
    if not is_same:
        return f" ({flag}={before.total}: as it was)"
    return f" ({flag}=auto: that of {now.steps} steps)" if now.total < now.steps else ""
