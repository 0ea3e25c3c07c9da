"""What a rule looks at, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

from fgpt.config.deepspeed.check import lookup
from fgpt.config.schema import RunConfig
from fgpt.optim.optimizers import OPTIMIZERS, Optimizer


class InvalidValueError(Exception):
    """A rule asked for a value that already has a issue: the rule is skipped, not guessed."""


class Finding(NamedTuple):
    """One place where a rule applies."""

    where: str
    """`deepspeed.<key>`, `run.<field>` or `launch`."""
    what: str
    """What is wrong there, with the values."""
    fix: str = ""
    """Instead of the rule's fix, where a better one can be computed."""


@dataclass(frozen=True)
class Context:
    """Both inputs after type checks, with every "auto" and None that can be derived filled in."""

    tree: Mapping[str, Any]
    """The DeepSpeed JSON: only keys that were written and are well-formed."""
    run_config: RunConfig
    invalid: frozenset[str]
    """Paths (`deepspeed.a.b`, `run.c.d`) with a issue of their own, and what derives from them."""
    derived: frozenset[str]
    """`run.` paths that nobody wrote."""
    world: int
    """Processes."""
    device: str
    """cpu or cuda."""
    packages: frozenset[str]
    """The optional packages that can be imported here."""

    def ds(self, path: str) -> Any:
        """The value of a DeepSpeed key; DeepSpeed's default if it was not written."""
        self._trust(f"deepspeed.{path}")
        value, key = lookup(self.tree, path)
        return key.default if value is None and key is not None else value

    def wrote(self, path: str) -> bool:
        """Whether the JSON holds this key."""
        self._trust(f"deepspeed.{path}")
        return lookup(self.tree, path)[0] is not None

    def run(self, path: str) -> Any:
        """The value of a run-file field."""
        self._trust(f"run.{path}")
        return reduce(getattr, path.split("."), self.run_config)

    def _trust(self, path: str) -> None:
        parts = path.split(".")
        if any(".".join(parts[: i + 1]) in self.invalid for i in range(len(parts))):
            raise InvalidValueError(path)

    @property
    def stage(self) -> int:
        return int(self.ds("zero_optimization.stage"))

    @property
    def precision(self) -> str:
        """fp16 before bf16, as a report has to choose one where both are on."""
        if self.ds("fp16.enabled"):
            return "fp16"
        return "bf16" if self.ds("bf16.enabled") else "fp32"

    @property
    def offloads_optimizer(self) -> bool:
        return bool(self.ds("zero_optimization.offload_optimizer.device") != "none")

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer the JSON names, if it is one DeepSpeed knows."""
        return OPTIMIZERS.get(str(self.ds("optimizer.type")).lower())


@dataclass(frozen=True)
class Rule:
    """One thing that DeepSpeed refuses late, ignores, or computes wrongly."""

    id: str
    """Its name in reports and in ds_configs/README.md."""
    reason: str
    """Why it is a issue, in one sentence for the user."""
    fix: str
    """What to write instead."""
    applies: Callable[[Context], Iterable[Finding]]
    """Where it applies; a generator of findings."""

    def findings(self, context: Context) -> list[Finding]:
        """All findings; none where a value the rule needs is itself at issue."""
        try:
            return list(self.applies(context))
        except InvalidValueError:
            return []
