"""What a DeepSpeed JSON means: the one place that knows where each setting is and its default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fgpt.config.deepspeed.keys import TOP
from fgpt.optim.optimizers import OPTIMIZERS, Implementation, Optimizer
from fgpt.optim.schedules import SCHEDULERS
from fgpt.utils.keys import Key, nearest

Tree = Mapping[str, Any]
Precision = Literal["fp32", "bf16", "fp16"]
CHECKPOINTING = "activation_checkpointing"
GRAD_ACCUM_DTYPE = "data_types.grad_accum_dtype"
OPTIMIZER_OFFLOAD = "zero_optimization.offload_optimizer"
PARAM_OFFLOAD = "zero_optimization.offload_param"
MONITORS = ("tensorboard", "csv_monitor", "wandb")


class InvalidValueError(Exception):
    """Code asked for a value that the configuration check has already refused."""


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A DeepSpeed JSON whose known keys are well-formed, with DeepSpeed's defaults.

    Every method and property raises InvalidValueError where it needs one of the `invalid` keys.
    """

    tree: Tree
    """The JSON."""
    invalid: frozenset[str] = frozenset()
    """Dotted keys and sections that `tree` lacks because the check refused their values."""

    def written(self, path: str) -> Any:
        """The value at a dotted path; None if the JSON does not have it."""
        prefix = ""
        for name in ("", *path.split(".")):
            prefix = f"{prefix}.{name}".strip(".")
            if prefix in self.invalid:
                raise InvalidValueError(path)
        return value_at(self.tree, path)

    def get(self, path: str) -> Any:
        """The value at a dotted path, or the key's default."""
        value = self.written(path)
        if value is None:
            section, _, name = path.rpartition(".")
            key = (keys_of(section, self.tree) or {}).get(name)
            value = key.default if key else None
        return value

    @property
    def zero_stage(self) -> int:
        """zero_optimization.stage."""
        return int(self.get("zero_optimization.stage"))

    @property
    def precision(self) -> Precision:
        """fp16 where both fp16 and bf16 are on, which a rule refuses."""
        if self.get("fp16.enabled"):
            return "fp16"
        return "bf16" if self.get("bf16.enabled") else "fp32"

    @property
    def precision_text(self) -> str:
        """The precision in words, with torch_autocast."""
        if not self.get("torch_autocast.enabled"):
            return self.precision
        return f"{self.precision} weights with {self.get('torch_autocast.dtype')} autocast"

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states and master weights are in host memory."""
        return bool(self.get(f"{OPTIMIZER_OFFLOAD}.device") != "none")

    @property
    def offloads_params(self) -> bool:
        """Whether the weights are in host memory."""
        return bool(self.get(f"{PARAM_OFFLOAD}.device") != "none")

    @property
    def nvme_paths(self) -> dict[str, str]:
        """What is offloaded to NVMe: section -> its directory."""
        sections = (PARAM_OFFLOAD, OPTIMIZER_OFFLOAD)
        on_nvme = [section for section in sections if self.get(f"{section}.device") == "nvme"]
        return {section: str(self.get(f"{section}.nvme_path")) for section in on_nvme}

    @property
    def accumulates_fp32(self) -> bool:
        """Whether gradients are added up in fp32."""
        return self.precision == "fp32" or self.get(GRAD_ACCUM_DTYPE) == "fp32"

    @property
    def has_separate_grad_sums(self) -> bool:
        """Whether DeepSpeed's BF16_Optimizer keeps fp32 sums beside the bf16 gradients."""
        is_bf16_zero_1 = self.precision == "bf16" and self.zero_stage == 1
        return is_bf16_zero_1 and self.accumulates_fp32 and not self.offloads_optimizer

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that the JSON names; None if it names none that DeepSpeed knows."""
        return OPTIMIZERS.get(str(self.written("optimizer.type")).lower())

    @property
    def optimizer_params(self) -> dict[str, Any]:
        """optimizer.params as written."""
        return dict(self.written("optimizer.params") or {})

    @property
    def implementation(self) -> Implementation:
        """The implementation that DeepSpeed selects; torch if it has none of its own."""
        return _implementation(self.written, self.optimizer)

    @property
    def uses_cpu_adam(self) -> bool:
        """Whether DeepSpeedCPUAdam updates the weights."""
        is_adam = self.optimizer is not None and self.optimizer.is_adam
        return is_adam and self.implementation == "cpu"

    @property
    def operator(self) -> str | None:
        """The DeepSpeed builder of the C++ operator that the optimizer needs; None: none."""
        return self.optimizer.operators.get(self.implementation) if self.optimizer else None

    @property
    def checkpointing(self) -> dict[str, Any] | None:
        """The activation_checkpointing section; its presence turns recomputation on."""
        section = self.written(CHECKPOINTING)
        return None if section is None else dict(section)

    @property
    def monitors(self) -> dict[str, Any]:
        """The sections of the monitors that are on."""
        return {m: dict(self.tree[m]) for m in MONITORS if self.get(f"{m}.enabled")}

    @property
    def log_level(self) -> str:
        """DeepSpeed's log level: log_level, else info if a key turns on output at info."""
        printing = ("wall_clock_breakdown", "memory_breakdown", "steps_per_print")
        prints = any(map(self.get, (*printing, "comms_logger.enabled")))
        return str(self.get("log_level") or ("info" if prints else "warning"))


def value_at(tree: Any, path: str) -> Any:
    """The value at a dotted path of nested dictionaries; None if there is none."""
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def set_at(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path, creating sections; None removes the key."""
    *sections, name = path.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            if value is None:
                return
            tree[section] = {}
        tree = tree[section]
    if value is None:
        tree.pop(name, None)
    else:
        tree[name] = value


def leaf_values(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in nested dictionaries that is no section."""
    for name, value in tree.items():
        inner = f"{path}.{name}" if path else name
        if isinstance(value, Mapping) and value:
            yield from leaf_values(value, inner)
        else:
            yield inner, value


def walk(tree: Tree) -> Iterator[tuple[str, Key, Any]]:
    """(dotted path, Key, value) of every known key written in `tree`, sections included."""

    def below(section: Tree, path: str) -> Iterator[tuple[str, Key, Any]]:
        keys = keys_of(path, tree) or {}
        for name, value in section.items():
            if name in keys:
                inner = f"{path}.{name}" if path else name
                yield inner, keys[name], value
                if isinstance(value, dict) and keys[name].is_checked:
                    yield from below(value, inner)

    return below(tree, "")


def keys_of(path: str, tree: Tree) -> Mapping[str, Key] | None:
    """The keys that a section may have; None if they depend on a `type` that is not valid."""
    if not path:
        return TOP
    if path == "optimizer.params":
        written = value_at(tree, "optimizer.type")
        kind = _intended("AdamW" if written is None else written, OPTIMIZERS)  # as `fill_in`
        optimizer = OPTIMIZERS.get(kind.lower())
        if optimizer is None or optimizer.refused:
            return None
        return optimizer.keys(_implementation(partial(value_at, tree), optimizer))
    if path == "scheduler.params":
        return SCHEDULERS.get(_intended(value_at(tree, "scheduler.type"), SCHEDULERS))
    keys: Mapping[str, Key] | None = TOP
    for name in path.split("."):
        keys = keys[name].keys if keys and name in keys else None
    return keys


def _implementation(value: Callable[[str], Any], optimizer: Optimizer | None) -> Implementation:
    """The implementation, where `value` returns what the JSON has at a path.

    DeepSpeed takes torch's Adam where torch_adam is true, else its own, which it compiles. FGPT
    writes torch_adam true where the JSON leaves it open and torch's computes the same.
    """
    if optimizer is None:
        return "torch"
    if optimizer.is_own:
        return "fgpt"
    if optimizer.package:
        return "bitsandbytes"
    offloaded = value(f"{OPTIMIZER_OFFLOAD}.device") in ("cpu", "nvme")
    choice: Implementation = "cpu" if offloaded else "fused"
    if optimizer.is_adam:
        torch_adam = value("optimizer.params.torch_adam")
        if torch_adam is None:
            torch_adam = not _needs_own_adam(value, offloaded)
        if torch_adam is True:
            return "torch"
    return choice if choice in optimizer.operators else "torch"


def _needs_own_adam(value: Callable[[str], Any], offloaded: bool) -> bool:
    """Whether the JSON asks for something that only DeepSpeed's implementations of Adam have."""
    if False in (
        value(f"optimizer.params.{p}") for p in ("bias_correction", "fp32_optimizer_states")
    ):
        return True
    ratio = value(f"{OPTIMIZER_OFFLOAD}.ratio")
    is_partial = isinstance(ratio, int | float) and ratio < 1
    is_partial = is_partial and value("zero_optimization.stage") == 3
    return offloaded and (is_partial or value("bf16.bf16_master_weights_and_grads") is True)


def _intended(word: Any, known: Mapping[str, Any]) -> str:
    """The known word nearest to `word`: parameters beside a misspelled type are checked too."""
    return (nearest(word, known) or word) if isinstance(word, str) else ""
