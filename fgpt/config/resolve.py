"""From the user's request to a complete configuration, or to a report of every issue."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch
from fgpt.config.deepspeed.check import CheckedJson, check
from fgpt.config.deepspeed.settings import DeepSpeedSettings, Precision, walk
from fgpt.config.derive import derive_run, resolve_autos
from fgpt.config.effective import (
    EngineChange,
    clips_in_fgpt,
    engine_config,
    is_pipe_partitioned,
)
from fgpt.config.rules import Context, Rule, keys, layout, optim, run, zero
from fgpt.config.run_file import Override, load, to_dict
from fgpt.config.schema import RunConfig
from fgpt.errors import ConfigError, ConfigIssue
from fgpt.utils.keys import AUTO
from fgpt.utils.strict_json import parse, read_object

OPTIONAL_PACKAGES = ("tensorboard", "wandb")
RULES: tuple[Rule, ...] = (*keys.RULES, *layout.RULES, *zero.RULES, *optim.RULES, *run.RULES)
"""All rules, in the order of reports and of ds_configs/README.md."""


@dataclass(frozen=True)
class RunRequest:
    """The user's input, before any file is read."""

    ds_config: Path
    """The DeepSpeed JSON."""
    run_file: Path | None = None
    """The run file; None: every default."""
    overrides: tuple[Override, ...] = ()
    """The flags, in the order given; a later one wins."""
    deepspeed: Mapping[str, Any] | None = None
    """The DeepSpeed configuration, instead of the file; `ds_config` is then its name in reports."""


@dataclass(frozen=True)
class Resolved:
    """A complete configuration: no None that can be derived, no "auto". Equal on every rank."""

    run: RunConfig
    """The run file and the flags."""
    deepspeed: dict[str, Any]
    """The user's DeepSpeed JSON, always with the batch triple, clipping and ZeRO stage, and with
    DeepSpeed's spelling of the optimizer's type."""
    engine_json: dict[str, Any]
    """What deepspeed.initialize gets: `deepspeed` with the `engine_changes`. Pass it a copy."""
    engine_changes: tuple[EngineChange, ...]
    """Every difference between `deepspeed` and `engine_json`."""
    batch: Batch
    """The batch arithmetic and the grid."""
    origins: Mapping[str, str]
    """`run.<field>` / `deepspeed.<key>` -> default | preset NAME | file PATH | flag --x |
    derived: how."""
    device: str
    """cpu or cuda."""

    @property
    def settings(self) -> DeepSpeedSettings:
        """The meaning of `deepspeed`."""
        return DeepSpeedSettings(self.deepspeed)

    @property
    def engine_settings(self) -> DeepSpeedSettings:
        """The meaning of `engine_json`."""
        return DeepSpeedSettings(self.engine_json)

    @property
    def precision(self) -> Precision:
        """fp32, bf16 or fp16."""
        return self.settings.precision

    @property
    def zero_stage(self) -> int:
        """The user's ZeRO stage."""
        return self.settings.zero_stage

    @property
    def seq_len(self) -> int:
        """Tokens per sample."""
        length = self.run.data.seq_len
        assert length is not None  # derived
        return length

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of the weights and activations."""
        return 4 if self.precision == "fp32" else 2

    @property
    def clips_in_fgpt(self) -> bool:
        """Whether FGPT clips the gradients, not DeepSpeed."""
        return clips_in_fgpt(self.settings, self.run)

    @property
    def is_pipe_partitioned(self) -> bool:
        """Whether tensor-parallel ranks send only a part each of a pipeline stage's output."""
        return is_pipe_partitioned(self.run, self.batch)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {
            "run": to_dict(self.run),
            "deepspeed": self.deepspeed,
            "engine_json": self.engine_json,
            "engine_changes": [change._asdict() for change in self.engine_changes],
            "batch": asdict(self.batch),
            "precision": self.precision,
            "zero_stage": self.zero_stage,
            "device": self.device,
            "origins": dict(self.origins),
        }
        return copy.deepcopy(values)

    def fingerprint(self) -> str:
        """SHA-256 of the values, without their origins and what is derived for DeepSpeed."""
        values = self.to_json()
        for name in ("origins", "engine_json", "engine_changes"):
            del values[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def resolve(request: RunRequest, *, world: int, device: str) -> Resolved:
    """Read, check and complete a request for `world` processes on `device` (cpu or cuda).

    Raises ConfigError with every issue of both files and the flags.
    """
    checked = _read_deepspeed(request)
    loaded = load(request.run_file, request.overrides)
    derived = derive_run(loaded.run, request.ds_config, loaded.invalid)
    tree, auto_origins = resolve_autos(checked.tree, derived.run, device)
    context = Context(
        deepspeed=DeepSpeedSettings(tree, frozenset(checked.invalid)),
        run_config=derived.run,
        invalid=frozenset(loaded.invalid | derived.invalid),
        derived=frozenset(derived.origins),
        world=world,
        device=device,
        packages=frozenset(p for p in OPTIONAL_PACKAGES if importlib.util.find_spec(p)),
    )
    origins = {f"run.{path}": how for path, how in {**loaded.origins, **derived.origins}.items()}
    for path, _, value in walk(tree):
        if not isinstance(value, dict):
            origins[f"deepspeed.{path}"] = auto_origins.get(path, f"file {request.ds_config}")
    issues = [*checked.issues, *loaded.issues]
    for rule in RULES:
        for where, what, fix in rule.findings(context):
            place = _place(where, request, origins)
            issues.append(ConfigIssue(place, what, f"{fix or rule.fix} [{rule.id}]"))
    if issues:
        raise ConfigError(issues)
    return _complete(context, tree, origins)


def _read_deepspeed(request: RunRequest) -> CheckedJson:
    file = str(request.ds_config)
    try:
        if request.deepspeed is None:
            return check(read_object(request.ds_config), file)
        return check(parse(json.dumps(dict(request.deepspeed)), file), file)
    except ConfigError as error:
        return CheckedJson(invalid={""}, issues=list(error.issues))


def _complete(context: Context, tree: dict[str, Any], origins: dict[str, str]) -> Resolved:
    """Complete a configuration without issues."""
    batch = layout.batch_of(context)
    triple = {GLOBAL: batch.global_size, MICRO: batch.micro, ACCUMULATION: batch.accumulation}
    for name, number in triple.items():
        if tree.get(name) in (None, AUTO):
            origins[f"deepspeed.{name}"] = "derived: global = micro x accumulation x dp"
        tree[name] = number
    optimizer = context.deepspeed.optimizer
    assert optimizer is not None  # or optimizer-needed would apply
    tree["optimizer"]["type"] = optimizer.name
    tree.setdefault("gradient_clipping", context.ds("gradient_clipping"))
    tree.setdefault("zero_optimization", {}).setdefault("stage", 0)
    for path in ("gradient_clipping", "zero_optimization.stage"):
        origins.setdefault(f"deepspeed.{path}", "default")
    engine_json, engine_changes = engine_config(tree, context.run_config, batch)
    return Resolved(
        run=context.run_config,
        deepspeed=tree,
        engine_json=engine_json,
        engine_changes=engine_changes,
        batch=batch,
        origins=dict(sorted(origins.items())),
        device=context.device,
    )


def _place(where: str, request: RunRequest, origins: Mapping[str, str]) -> str:
    """Where the user wrote a finding's value: the file or flag, and its path."""
    root, _, path = where.partition(".")
    if root == "deepspeed":
        return f"{request.ds_config}: {path}"
    if root == "launch":
        return path
    origin = origins.get(where, "default")
    if origin.startswith("file "):
        return f"{origin.removeprefix('file ')}: {path}"
    if origin.startswith("flag "):
        flag = origin.removeprefix("flag ")
        return f"{flag} {path}" if flag == "--set" else f"{flag} ({path})"
    return f"{path} ({origin})"
