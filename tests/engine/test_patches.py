"""Private names of DeepSpeed and torch: the installed versions have them, one file uses them."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fgpt.engine.deepspeed import patches
from fgpt.engine.deepspeed.private_names import PRIVATE, PrivateName
from fgpt.errors import TrainingError
from tests.ranks import ROOT

PATCHES = ROOT / "fgpt" / "engine" / "deepspeed" / "patches.py"
STANDARD = {"_replace", "_asdict", "_fields", "_exit", "_current_frames", "__version__"}
"""Documented names of the standard library, and our own version."""
OTHER_LIBRARIES = {
    ("fgpt/prepare/sources/hub.py", "_fingerprint"),  # datasets: identity of a loaded data set
    ("fgpt/tokenizer/gigatoken_encoder.py", "_load"),  # gigatoken: SentencePiece conversion
    # torch.ops.mkldnn, as torch's own inductor calls it; tests/model/test_packed_linear.py
    ("fgpt/model/kernels/packed_linear.py", "_reorder_linear_weight"),
    ("fgpt/model/kernels/packed_linear.py", "_is_mkldnn_bf16_supported"),
    ("fgpt/model/kernels/packed_linear.py", "_is_mkldnn_fp16_supported"),
    # CUDA graphs: tensors whose addresses stay
    ("fgpt/model/kv_cache.py", "_dynamo"),
}


def owner_of(name: PrivateName) -> Any:
    """Import a dotted path: the longest module, then attributes."""
    importlib.import_module("torch.nn.attention.varlen")  # registers torch.ops.torch_attn
    parts = name.owner.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for attribute in parts[n:]:
            found = getattr(found, attribute)
        return found
    raise ImportError(name.owner)


def exists(name: PrivateName) -> bool:
    """True if the owner has the attribute, or its source assigns or mentions it."""
    owner = owner_of(name)
    return hasattr(owner, name.name) or name.name in inspect.getsource(owner)


@pytest.mark.parametrize("name", PRIVATE, ids=lambda n: f"{n.owner}.{n.name}")
def test_the_installed_version_still_has(name: PrivateName) -> None:
    try:
        assert exists(name)
    except (ImportError, AttributeError, TypeError, AssertionError) as error:
        pytest.fail(f"gone: {name.owner}.{name.name}; used for: {name.why} ({error})")


def test_a_name_that_is_gone_is_noticed() -> None:
    assert not exists(PrivateName("torch.optim.adam.Adam", "_no_such_name", ""))
    with pytest.raises(ImportError):
        owner_of(PrivateName("no_such_package.x", "y", ""))


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of private attributes of other objects, in code and in getattr("...")."""

    def is_private(name: str) -> bool:
        return name.startswith("_") and (not name.endswith("__") or name == "__compatible_ops__")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            is_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            if not is_own and not is_super:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and is_private(str(argument.value)):
                    yield node.lineno, argument.value
        elif isinstance(node, ast.ImportFrom):
            for name in (*(node.module or "").split("."), *(alias.name for alias in node.names)):
                if name != "__future__" and is_private(name):
                    yield node.lineno, name


def test_no_other_file_uses_private_names() -> None:
    torch_names = {n.name for n in PRIVATE if n.owner.startswith("torch")}
    torch_names |= {part for n in PRIVATE for part in n.owner.split(".") if n.name in torch_names}
    allowed = STANDARD | torch_names
    found = []
    for file in sorted(Path(ROOT / "fgpt").rglob("*.py")):
        place = str(file.relative_to(ROOT))
        found += [
            f"{place}:{line}: {name}"
            for line, name in private_names(file.read_text())
            if file != PATCHES and name not in allowed and (place, name) not in OTHER_LIBRARIES
        ]
    assert found == [], (
        "move these to fgpt/engine/deepspeed/patches.py, with an entry in private_names.PRIVATE"
    )


def test_every_private_name_of_patches_is_in_the_table() -> None:
    listed = {name.name for name in PRIVATE}
    used = {name for _, name in private_names(PATCHES.read_text())}
    assert used <= listed


def test_the_scan_sees_every_way_to_a_private_name() -> None:
    source = """
engine._take_model_step(x)
setattr(engine, "_flag", 1)
from deepspeed.utils import _name
deepspeed.ops.__compatible_ops__
self._mine, super()._mine, cls._mine, __import__, x.__class__
"""
    names = [name for _, name in private_names(source)]
    assert sorted(names) == ["__compatible_ops__", "_flag", "_name", "_take_model_step"]


@pytest.mark.parametrize(
    "error", [None, TrainingError("on all ranks"), RuntimeError("a lost rank")]
)
def test_parameters_are_as_before_after_an_error_of_all_ranks(error: Exception | None) -> None:
    calls: list[str] = []
    optimizer = SimpleNamespace(
        fp32_partitioned_groups_flat=[],
        checkpoint_event_prologue=lambda: calls.append("shard"),
        checkpoint_event_epilogue=lambda: calls.append("gather"),
    )
    with nullcontext() if error is None else pytest.raises(type(error)):
        with patches.all_sharded(optimizer):
            if error is not None:
                raise error
    # gathering would wait for a rank that is gone
    assert calls == ["shard", *([] if isinstance(error, RuntimeError) else ["gather"])]


def test_the_second_optimizer_follows_the_schedule() -> None:
    """DeepSpeed's, with a part of the optimizer offloaded: built here as ZeRO-3 builds it."""
    one, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    first = torch.optim.AdamW([{"params": [one], "lr_factor": 0.5}, {"params": []}], lr=1.0)
    copied = torch.optim.AdamW([other], lr=first.param_groups[0]["lr"], weight_decay=0.0)
    copied.add_param_group(first.param_groups[1])
    engine = SimpleNamespace(
        basic_optimizer=first, optimizer=SimpleNamespace(backup_optimizer=copied)
    )
    assert patches.follow_with_second_optimizer(engine) == [copied]
    for group in first.param_groups:
        group.update(lr=0.25, weight_decay=0.0)  # by a schedule
    other.grad = torch.ones(3)
    copied.step()
    torch.testing.assert_close(other.detach(), torch.full((3,), 0.75))  # Adam's first step is lr
    engine.optimizer = SimpleNamespace()
    assert patches.follow_with_second_optimizer(engine) == []
