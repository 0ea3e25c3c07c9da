"""From the user's request to a complete configuration, or to a report of every issue."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fgpt.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch, BatchError, BatchRamp, solve
from fgpt.config.deepspeed.check import CheckedJson, check
from fgpt.config.deepspeed.formats import read_deepspeed, refuse_other_formats
from fgpt.config.deepspeed.settings import (
    DeepSpeedSettings,
    Precision,
    set_at,
    value_at,
    walk,
)
from fgpt.config.deepspeed.translate import Wish, translate
from fgpt.config.derive import Dialect, derive_run, fill_in, monitor_paths, resolve_autos
from fgpt.config.effective import (
    EngineChange,
    clips_in_fgpt,
    engine_config,
    is_pipe_partitioned,
)
from fgpt.config.length import settle_length
from fgpt.config.rules import (
    Context,
    Finding,
    Rule,
    edits_of,
    keys,
    layout,
    optim,
    rules_in,
    run,
    schedule,
    zero,
)
from fgpt.config.run_file import LoadedRun, Override, load, to_dict
from fgpt.config.schema import RunConfig, SavedModel
from fgpt.config.wishes import grant_wishes
from fgpt.errors import ConfigError, ConfigIssue
from fgpt.utils.keys import AUTO
from fgpt.utils.strict_json import parse

OPTIONAL_PACKAGES = ("tensorboard", "wandb", "bitsandbytes")
DS_SET = "--ds_set"
"""The flag that sets any key of the DeepSpeed JSON."""
RULES = [rule for module in (keys, layout, zero, optim, schedule, run) for rule in rules_in(module)]
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
    deepspeed_flags: tuple[Override, ...] = ()
    """The flags that set keys of the DeepSpeed JSON."""
    auto: Dialect = "fgpt"
    """What "auto" and absence mean."""
    tokens_of: Callable[[str], int | None] | None = None
    """Returns the training tokens of a prepared data set, for train.epochs; None: not prepared."""
    saved_model: Callable[[RunConfig], SavedModel] | None = None
    """Returns the model of a run with train.init_from: that of the checkpoint that the run resumes
    from, or that of the weights named. Raises CheckpointError."""


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
    issues: tuple[ConfigIssue, ...] = ()
    """Warnings and notes: what was dropped, translated and filled in."""

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
    def ramp(self) -> BatchRamp:
        """The global batch of every step."""
        return BatchRamp.of(self.run.train.batch_ramp, self.batch)

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
            "issues": [{"grade": issue.grade, "text": str(issue)} for issue in self.issues],
        }
        return copy.deepcopy(values)

    def fingerprint(self) -> str:
        """SHA-256 of the values, without their origins and what is derived for DeepSpeed."""
        values = self.to_json()
        for name in ("origins", "engine_json", "engine_changes", "issues"):
            del values[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def resolve(request: RunRequest, *, world: int, device: str) -> Resolved:
    """Read, check and complete a request for `world` processes on `device` (cpu or cuda).

    Raises ConfigError with every issue of both files and the flags.
    """
    examined = examine(request, world=world, device=device)
    if examined.resolved is None:
        raise ConfigError(examined.issues)
    return examined.resolved


@dataclass(frozen=True)
class Examined:
    """The result of `examine`."""

    tree: dict[str, Any]
    """The DeepSpeed JSON, translated and filled in, without what the warnings dropped."""
    issues: list[ConfigIssue]
    """Every finding, of all grades."""
    resolved: Resolved | None
    """The complete configuration; None if there are errors."""


def examine(request: RunRequest, *, world: int, device: str) -> Examined:
    """Find every issue of a request, and complete it if none is an error."""
    # 1. the JSON in today's words, with the flags; unknown keys, types and ranges
    checked, wishes = _read_deepspeed(request)
    # 2. the run file with its flags; what the JSON leaves open, and what it wishes of the run
    loaded = load(request.run_file, request.overrides)
    fill = partial(
        fill_in,
        invalid=checked.invalid,
        dialect=request.auto,
        has_schedule=loaded.run.schedule.kind != "deepspeed",
    )
    filled = fill(checked.tree)
    tree, notes = filled.tree, dict(filled.notes)
    set_by_flag, issues = _apply_flags(tree, request)
    issues = [*checked.issues, *issues, *loaded.issues]
    if loaded.run.train.init_from is not None and request.saved_model is not None:
        from fgpt.config.init_from import adopt_model  # rarely needed

        issues += adopt_model(loaded, request.saved_model(loaded.run))
    issues += settle_length(loaded, _batch(tree, loaded.run, world), request.tokens_of)
    issues += grant_wishes(wishes, loaded, tree, str(request.ds_config), device)
    # 3. the rules, again after each warning's edits; none is applied twice
    followed: dict[str, str] = {}
    while True:
        filled = fill(tree)  # an edit may leave a choice open
        tree, notes = filled.tree, {**notes, **filled.notes}
        context, origins = _context(request, tree, checked.invalid, loaded, world, device)
        origins |= _later_origins(tree, checked.tree, origins, set_by_flag, followed)
        found = [
            _issue(rule, finding, request, origins)
            for rule in RULES
            for finding in rule.findings(context)
        ]
        harmless = [i for i in found if i.grade != "error" and i.edits and str(i) not in followed]
        if not harmless:
            break
        issues += harmless
        apply_edits(tree, harmless)
        for issue in harmless:
            followed[str(issue)] = issue.rule
            followed |= {edit.path: issue.rule for edit in issue.edits}
    issues += found
    for path, (what, became) in notes.items():
        if path not in set_by_flag:
            issues.append(ConfigIssue(f"{request.ds_config}: {path}", what, became, "note"))
    if any(issue.grade == "error" for issue in issues):
        return Examined(tree, issues, None)
    return Examined(tree, issues, _complete(context, origins, issues))


def _batch(tree: Mapping[str, Any], run: RunConfig, world: int) -> Batch | None:
    """The batch arithmetic; None where it is wrong, which the rules report."""
    sizes = [tree.get(name) for name in (GLOBAL, MICRO, ACCUMULATION)]
    global_size, micro, accumulation = (s if isinstance(s, int) else None for s in sizes)
    grid = run.parallel
    if world % (grid.tp * grid.pp * grid.cp) or (global_size is None and micro is None):
        return None
    try:
        return solve(
            global_size=global_size,
            micro=micro,
            accumulation=accumulation,
            world=world,
            tp=grid.tp,
            pp=grid.pp,
            cp=grid.cp,
        )
    except BatchError:
        return None


def apply_edits(tree: dict[str, Any], issues: Sequence[ConfigIssue]) -> None:
    """Follow the remedies of these issues in a DeepSpeed JSON."""
    for edit in (edit for issue in issues for edit in issue.edits):
        root, _, path = edit.path.partition(".")
        if root == "deepspeed":
            set_at(tree, path, edit.value)


def _read_deepspeed(request: RunRequest) -> tuple[CheckedJson, list[Wish]]:
    file = str(request.ds_config)
    try:
        if request.deepspeed is None:
            tree = read_deepspeed(request.ds_config)
        else:
            tree = parse(json.dumps(dict(request.deepspeed)), file)
        refuse_other_formats(tree, file)
        changed = [flag for flag in request.deepspeed_flags if flag.flag == DS_SET]
        for key, value, _ in changed:
            set_at(tree, key, value)
    except ConfigError as error:
        return CheckedJson(invalid={""}, issues=list(error.issues)), []
    translated = translate(tree, file)
    checked = check(translated.tree, file)
    keys = [key for key, _, _ in changed]
    checked.issues = [
        replace(issue, where=_flag_place(issue, file, keys))
        for issue in (*translated.issues, *checked.issues)
    ]
    return checked, translated.wishes


def _flag_place(issue: ConfigIssue, file: str, keys: Sequence[str]) -> str:
    """The place of an issue of the JSON: --ds_set, where that wrote the key or around it."""
    path = issue.where.removeprefix(file).removeprefix(": ")
    for key in keys:
        related = path and (f"{path}.".startswith(f"{key}.") or f"{key}.".startswith(f"{path}."))
        section, _, name = key.rpartition(".")
        unknown = {section: name, "": key.partition(".")[0]}
        is_unknown = f"unknown key {unknown.get(path)!r}" in issue.what
        if is_unknown or (related and "unknown key" not in issue.what):
            return f"{DS_SET} {key}"
    return issue.where


def _apply_flags(
    tree: dict[str, Any], request: RunRequest
) -> tuple[dict[str, str], list[ConfigIssue]]:
    """Write the flags of the DeepSpeed JSON into `tree`; return key -> flag, and notes.

    A batch size that contradicts the flags gives way: after --micro_batch the global batch stays.
    """
    given = {key: flag for key, _, flag in request.deepspeed_flags}
    notes = []
    for key, value, flag in request.deepspeed_flags:
        if flag != DS_SET:  # which was applied before the JSON was checked
            set_at(tree, key, value)
    sizes = [name for name in (GLOBAL, MICRO, ACCUMULATION) if name in given]
    order = (ACCUMULATION, GLOBAL, MICRO)
    rest = [n for n in order if n not in given and tree.get(n) not in (None, AUTO)]
    if sizes and rest and len(sizes) + len(rest) > 2:
        what, fix = str(tree.pop(rest[0])), f"gives way to {' and '.join(given[n] for n in sizes)}"
        notes.append(ConfigIssue(f"{request.ds_config}: {rest[0]}", what, fix, "note"))
    lr, peak = "optimizer.params.lr", "scheduler.params.warmup_max_lr"
    muon_lr = value_at(tree, "optimizer.params.muon_lr")
    if lr in given and muon_lr is not None:
        what = f"{muon_lr} beside {given[lr]}, which does not set it"
        fix = "kept; --ds_set optimizer.params.muon_lr=... does"
        where = f"{request.ds_config}: optimizer.params.muon_lr"
        notes.append(ConfigIssue(where, what, fix, "note"))
    elif lr in given and value_at(tree, "scheduler.type") in ("WarmupLR", "WarmupDecayLR"):
        set_at(tree, peak, value_at(tree, lr))
        given[peak] = given[lr]
    return given, notes


def _context(
    request: RunRequest,
    tree: dict[str, Any],
    invalid: set[str],
    loaded: LoadedRun,
    world: int,
    device: str,
) -> tuple[Context, dict[str, str]]:
    """What the rules read, and the origin of each value."""
    derived = derive_run(loaded.run, request.ds_config, loaded.invalid)
    without_autos, auto_origins = resolve_autos(tree, derived.run, device, request.auto)
    context = Context(
        deepspeed=DeepSpeedSettings(without_autos, frozenset(invalid)),
        run_config=derived.run,
        invalid=frozenset(loaded.invalid | derived.invalid),
        derived=frozenset(derived.origins),
        world=world,
        device=device,
        packages=frozenset(p for p in OPTIONAL_PACKAGES if importlib.util.find_spec(p)),
    )
    origins = {f"run.{path}": how for path, how in {**loaded.origins, **derived.origins}.items()}
    for path, _, value in walk(without_autos):
        if not isinstance(value, dict):
            origins[f"deepspeed.{path}"] = auto_origins.get(path, f"file {request.ds_config}")
    return context, origins


def _issue(
    rule: Rule, finding: Finding, request: RunRequest, origins: Mapping[str, str]
) -> ConfigIssue:
    place = _place(finding.where, request, origins)
    fix, grade = finding.fix or rule.fix, finding.grade or rule.grade
    is_auto = origins.get(finding.where, "").startswith("derived: auto")
    what = f'{finding.what} (written "auto")' if is_auto else finding.what
    return ConfigIssue(place, what, fix, grade, edits_of(finding), rule.id)


def _later_origins(
    tree: Mapping[str, Any],
    written: Mapping[str, Any],
    origins: Mapping[str, str],
    set_by_flag: Mapping[str, str],
    followed: Mapping[str, str],
) -> dict[str, str]:
    """The origins of the JSON's values that are not the file's: flags, rules, and filled in."""
    later = {}
    for path, _, _ in walk(tree):
        rooted = f"deepspeed.{path}"
        if path in set_by_flag:
            later[rooted] = f"flag {set_by_flag[path]}"
        elif rooted in followed:
            later[rooted] = f"rule {followed[rooted]}"
        elif origins.get(rooted, "").startswith("file ") and value_at(written, path) is None:
            later[rooted] = "filled in"
    return {path: how for path, how in later.items() if path in origins}


def _complete(context: Context, origins: dict[str, str], issues: Sequence[ConfigIssue]) -> Resolved:
    """Complete a configuration without errors."""
    tree = copy.deepcopy(dict(context.deepspeed.tree))
    batch = layout.batch_of(context)
    triple = {GLOBAL: batch.global_size, MICRO: batch.micro, ACCUMULATION: batch.accumulation}
    for name, number in triple.items():
        if tree.get(name) in (None, AUTO):
            origins[f"deepspeed.{name}"] = "derived: global = micro x accumulation x dp"
        tree[name] = number
    optimizer = context.deepspeed.optimizer
    assert optimizer is not None  # filled in
    tree["optimizer"]["type"] = optimizer.name
    tree.setdefault("gradient_clipping", context.ds("gradient_clipping"))
    tree.setdefault("zero_optimization", {}).setdefault("stage", 0)
    for path in ("gradient_clipping", "zero_optimization.stage"):
        origins.setdefault(f"deepspeed.{path}", "default")
    for path, value in monitor_paths(context.deepspeed, str(context.run_config.run_dir)):
        set_at(tree, path, value)
        origins[f"deepspeed.{path}"] = "derived: from run_dir"
    engine_json, engine_changes = engine_config(tree, context.run_config, batch)
    return Resolved(
        run=context.run_config,
        deepspeed=tree,
        engine_json=engine_json,
        engine_changes=engine_changes,
        batch=batch,
        origins=dict(sorted(origins.items())),
        device=context.device,
        issues=tuple(issue for issue in issues if issue.grade != "error"),
    )


def _place(where: str, request: RunRequest, origins: Mapping[str, str]) -> str:
    """Where the user wrote a finding's value: the file or flag, and its path."""
    root, _, path = where.partition(".")
    origin = origins.get(where, "default")
    if root == "deepspeed" and not origin.startswith("flag "):
        return f"{request.ds_config}: {path}"
    if root == "launch":
        return path
    if origin.startswith("file "):
        return f"{origin.removeprefix('file ')}: {path}"
    if origin.startswith("flag "):
        flag = origin.removeprefix("flag ")
        return f"{flag} {path}" if flag == "--set" else f"{flag} ({path})"
    return f"{path} ({origin})"
