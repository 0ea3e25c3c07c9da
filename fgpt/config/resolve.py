"""The door to a configuration: what the user typed -> all that a run needs, or every issue."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch
from fgpt.config.deepspeed.check import Checked, check, walk
from fgpt.config.derive import derive_run, resolve_autos
from fgpt.config.load import load, to_dict
from fgpt.config.request import RunRequest
from fgpt.config.rules import RULES, batch_of
from fgpt.config.rules.context import Context
from fgpt.config.schema import RunConfig
from fgpt.errors import ConfigError, ConfigIssue
from fgpt.utils.keys import AUTO
from fgpt.utils.strict_json import read_object

Precision = Literal["fp32", "bf16", "fp16"]
OPTIONAL_PACKAGES = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Resolved:
    """One run, complete: no None that can be derived, no "auto". Equal on every rank."""

    run: RunConfig
    deepspeed: dict[str, Any]
    """For deepspeed.initialize; the batch triple, clipping and ZeRO stage are always in it,
    and the optimizer's type has its usual capitals."""
    batch: Batch
    origins: Mapping[str, str]
    """`run.<field>` / `deepspeed.<key>` -> default | preset NAME | file PATH | flag --x |
    derived: how."""
    precision: Precision
    zero_stage: int
    device: str
    """cpu or cuda."""

    @property
    def seq_len(self) -> int:
        """Tokens per sample."""
        length = self.run.data.seq_len
        assert length is not None  # resolved
        return length

    @property
    def element_bytes(self) -> int:
        """Bytes of one number that the model computes with."""
        return 4 if self.precision == "fp32" else 2

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, origins included."""
        return {
            "run": to_dict(self.run),
            "deepspeed": json.loads(json.dumps(self.deepspeed)),
            "batch": asdict(self.batch),
            "precision": self.precision,
            "zero_stage": self.zero_stage,
            "device": self.device,
            "origins": dict(self.origins),
        }

    def fingerprint(self) -> str:
        """SHA-256 of the values; where they came from does not count."""
        values = {name: value for name, value in self.to_json().items() if name != "origins"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def resolve(request: RunRequest, *, world: int, device: str) -> Resolved:
    """Read, check and complete what `request` names, for `world` processes on `device`.

    Raises ConfigError with every issue of both files and the flags at once.
    """
    checked = _read_deepspeed(request)
    loaded = load(request.run_file, request.overrides)
    derived = derive_run(loaded.run, request.ds_config, loaded.invalid)
    tree, auto_origins = resolve_autos(checked.tree, derived.run, device)
    context = Context(
        tree=tree,
        run_config=derived.run,
        invalid=frozenset(
            {f"run.{path}" for path in loaded.invalid | derived.invalid}
            | {f"deepspeed.{path}" for path in checked.invalid}
        )
        | ({"deepspeed"} if checked.invalid == {""} else set()),
        derived=frozenset(f"run.{path}" for path in derived.origins),
        world=world,
        device=device,
        packages=frozenset(p for p in OPTIONAL_PACKAGES if importlib.util.find_spec(p)),
    )
    origins = _origins(request, tree, auto_origins, {**loaded.origins, **derived.origins})
    issues = [*checked.issues, *loaded.issues]
    for rule in RULES:
        for where, what, fix in rule.findings(context):
            place = _place(where, request, origins)
            issues.append(ConfigIssue(place, what, f"{fix or rule.fix} [{rule.id}]"))
    if issues:
        raise ConfigError(issues)
    return _complete(context, tree, origins)


def _read_deepspeed(request: RunRequest) -> Checked:
    file = request.ds_config
    try:
        tree = read_object(file) if request.deepspeed is None else dict(request.deepspeed)
        return check(tree, str(file))
    except ConfigError as error:
        return Checked(invalid={""}, issues=list(error.issues))


def _complete(context: Context, tree: dict[str, Any], origins: dict[str, str]) -> Resolved:
    """The faultless case: fill in what is always said."""
    batch = batch_of(context)
    triple = {GLOBAL: batch.global_size, MICRO: batch.micro, ACCUMULATION: batch.accumulation}
    for name, number in triple.items():
        if tree.get(name) in (None, AUTO):
            origins[f"deepspeed.{name}"] = "derived: global = micro x accumulation x dp"
        tree[name] = number
    assert context.optimizer is not None  # or optimizer-needed would have applied
    tree["optimizer"]["type"] = context.optimizer.name
    tree.setdefault("gradient_clipping", context.ds("gradient_clipping"))
    tree.setdefault("zero_optimization", {}).setdefault("stage", 0)
    for path in ("gradient_clipping", "zero_optimization.stage"):
        origins.setdefault(f"deepspeed.{path}", "default")
    precision: Any = context.precision
    return Resolved(
        run=context.run_config,
        deepspeed=tree,
        batch=batch,
        origins=dict(sorted(origins.items())),
        precision=precision,
        zero_stage=context.stage,
        device=context.device,
    )


def _origins(
    request: RunRequest,
    tree: Mapping[str, Any],
    autos: Mapping[str, str],
    run: Mapping[str, str],
) -> dict[str, str]:
    """The origin of every leaf of both trees."""
    origins = {f"run.{path}": origin for path, origin in run.items()}
    for path, _, value in walk(tree):
        if not isinstance(value, dict):
            origins[f"deepspeed.{path}"] = autos.get(path, f"file {request.ds_config}")
    return origins


def _place(where: str, request: RunRequest, origins: Mapping[str, str]) -> str:
    """A finding's path as the user knows it: the file or flag that holds the value."""
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
