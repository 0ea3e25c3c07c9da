"""What a rule is, and what it reads. The rules are in this package's modules, by topic.

An error stops the run: DeepSpeed refuses the configuration, or would compute something else than it
says, or it is a likely mistake. A warning stops nothing: its edits are applied, and it is reported.

To add a rule, write a generator of findings with `@rule` in the module that it belongs to, its row
in ds_configs/README.md, and a configuration that it applies to in tests/config/twins.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from types import ModuleType
from typing import Any, NamedTuple

from fgpt.config.deepspeed.settings import DeepSpeedSettings, InvalidValueError
from fgpt.config.schema import RunConfig
from fgpt.errors import Edit, Grade


class Finding(NamedTuple):
    """One place where a rule applies."""

    where: str
    """`deepspeed.<key>`, `run.<field>` or `launch`."""
    what: str
    """The offending value, in words."""
    fix: str = ""
    """The remedy, where it can be more specific than the rule's."""
    edits: tuple[Edit, ...] | None = None
    """The remedy as changes; None: the key at `where` is removed, if it is DeepSpeed's."""
    grade: Grade | None = None
    """None: the rule's."""


@dataclass(frozen=True)
class Context:
    """Both inputs after type checks, with every "auto" and None that can be derived filled in.

    Reading a value that the checks refused, or one derived from it, raises InvalidValueError.
    """

    deepspeed: DeepSpeedSettings
    """The DeepSpeed JSON."""
    run_config: RunConfig
    """The run file with its flags."""
    invalid: frozenset[str]
    """Run-file fields and sections whose values were refused, or derive from refused ones."""
    derived: frozenset[str]
    """Run-file fields that were not written."""
    world: int
    """Processes."""
    device: str
    """cpu or cuda."""
    packages: frozenset[str]
    """Installed optional packages."""

    def ds(self, path: str) -> Any:
        """The value of a DeepSpeed key, or DeepSpeed's default."""
        return self.deepspeed.get(path)

    def wrote(self, path: str) -> bool:
        """Whether the DeepSpeed JSON has this key."""
        return self.deepspeed.written(path) is not None

    def run(self, path: str) -> Any:
        """The value of a run-file field."""
        section = path.partition(".")[0]
        if path in self.invalid or section in self.invalid:
            raise InvalidValueError(path)
        return reduce(getattr, path.split("."), self.run_config)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.deepspeed.zero_stage

    @property
    def is_plain(self) -> bool:
        """Whether the plain engine trains, without DeepSpeed."""
        return bool(self.run("train.engine") == "plain")


@dataclass(frozen=True)
class Rule:
    """A kind of configuration that DeepSpeed refuses late, ignores, or computes wrongly."""

    id: str
    """Its name in reports and in ds_configs/README.md."""
    grade: Grade
    """error or warning."""
    reason: str
    """Why it is an error or has no effect, in one or two sentences for the user."""
    fix: str
    """The remedy; for warnings, what became of the value."""
    applies: Callable[[Context], Iterable[Finding]]
    """A generator of findings."""

    def findings(self, context: Context) -> list[Finding]:
        """All findings; none if the rule needs a value that is invalid."""
        try:
            return list(self.applies(context))
        except InvalidValueError:
            return []


def edits_of(finding: Finding) -> tuple[Edit, ...]:
    """What following the finding's remedy changes."""
    if finding.edits is not None:
        return finding.edits
    return (Edit(finding.where),) if finding.where.startswith("deepspeed.") else ()


def rule(
    id: str, fix: str, grade: Grade = "error"
) -> Callable[[Callable[[Context], Iterable[Finding]]], Rule]:
    """Turn a generator of findings into a `Rule`; its docstring is the reason."""

    def decorate(applies: Callable[[Context], Iterable[Finding]]) -> Rule:
        return Rule(id, grade, " ".join((applies.__doc__ or "").split()), fix, applies)

    return decorate


def rules_in(module: ModuleType) -> list[Rule]:
    """The rules of a module, in its order."""
    return [value for value in vars(module).values() if isinstance(value, Rule)]
