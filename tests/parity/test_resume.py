"""`fgpt resume-check` finds what a wrong resume changes, and names it in the row of its layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fgpt.checkpoint.manager import Checkpoints
from fgpt.checkpoint.manifest import read_manifest
from fgpt.checkpoint.reader import CheckpointReader
from fgpt.cli.resume_check import _parser, _resume_check
from fgpt.errors import TrainingError
from fgpt.parity.resume_layouts import SAME, UNINTERRUPTED, ResumeCheck, checkpoint
from fgpt.parity.resume_verdict import ResumeVerdict, compare
from fgpt.train import run
from tests.parity.resuming import flags, resume_check

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
PERTURBED = ("blocks.1.mlp.up.weight", "exp_avg")


def plant_faults() -> None:
    """One fault at each of four layouts, and none at the fifth."""
    load, plan_resume, copy = Checkpoints.load, run.plan_resume, CheckpointReader._copy

    def faulty_load(self: Any, engine: Any, point: Any, states: Any) -> None:
        layout = self.directory.root.parent.name
        if layout == "cp2":
            raise TrainingError("a planted failure")
        if layout == "zero1":
            progress = replace(point.manifest.progress, updates=point.manifest.progress.updates + 1)
            point = replace(point, manifest=replace(point.manifest, progress=progress))
        perturbs = mock.patch.object(
            CheckpointReader, "_copy", perturbed if layout == "zero3" else copy
        )
        with perturbs:
            load(self, engine, point, states)

    def perturbed(self: Any, name: str, state: str, box: Any, target: Any, bounds: Any) -> None:
        copy(self, name, state, box, target, bounds)
        if (name, state) == PERTURBED:
            target.mul_(1.001)

    def shifted_plan(context: Any, *rest: Any) -> Any:
        plan = plan_resume(context, *rest)
        if context.path.name == "zero0":
            plan = replace(plan, origin=(plan.origin[0], plan.origin[1] + 1))
        return plan

    Checkpoints.load = faulty_load  # type: ignore[method-assign]
    run.plan_resume = shifted_plan


@pytest.fixture(scope="module")
def faulty(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Layout -> its departures, with `plant_faults`."""
    folder = tmp_path_factory.mktemp("faulty")
    out = StringIO()
    names = "cp2,zero1,zero0,zero3,tp2"
    with redirect_stdout(out):
        code = resume_check(flags(folder, small_data, "--layouts", names, "--json"), plant_faults)
    assert code == 1
    result = json.loads(out.getvalue())
    assert not result["same"]
    return {layout["layout"]: layout["departures"] for layout in result["layouts"]}


def test_layouts_without_a_fault_pass_beside_the_others(faulty: dict[str, dict[str, str]]) -> None:
    assert list(faulty) == [SAME, "cp2", "zero1", "zero0", "zero3", "tp2"]
    assert faulty[SAME] == faulty["tp2"] == {}


def test_a_perturbed_tensor_is_named(faulty: dict[str, dict[str, str]]) -> None:
    name, state = PERTURBED
    found = faulty["zero3"]
    assert found["loaded"] == f"{state} of {name}: relative difference 1.0e-03, must be equal"
    assert not {"rate", "samples", "counters"} & found.keys()


def test_a_shifted_data_position_is_named(faulty: dict[str, dict[str, str]]) -> None:
    found = faulty["zero0"]
    assert found["samples"] == "step 4 read the samples 13-16, not 12-15"
    assert found["loss"].startswith("loss of step 4: ")
    assert found["counters"] == "samples_seen at the end: 25, not 24"
    assert not {"rate", "loaded"} & found.keys()


def test_a_wrong_counter_of_the_optimizer_is_named(faulty: dict[str, dict[str, str]]) -> None:
    found = faulty["zero1"]
    assert found["counters"] == "updates as loaded: 4, not 3"
    assert "weights" in found and not {"rate", "samples", "loaded"} & found.keys()


def test_a_run_that_fails_is_named_and_the_next_ones_train(
    faulty: dict[str, dict[str, str]],
) -> None:
    assert faulty["cp2"] == {"run": "the resumed run failed: a planted failure"}


@pytest.fixture(scope="module")
def kept(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ResumeCheck, Path]:
    """A check without faults, and its run directories."""
    folder = tmp_path_factory.mktemp("kept")
    arguments = flags(folder, small_data, "--layouts", "plain", "--steps", "4", "--at", "1")
    out = StringIO()
    with redirect_stdout(out):
        code = resume_check([*arguments, "--keep", str(folder / "runs")])
    assert code == 0 and "2 layouts: the same run" in out.getvalue(), out.getvalue()
    return _resume_check(_parser().parse_args(arguments), "cpu"), folder / "runs"


def change_metrics(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        if record["step"] == 3 and "loss" in record:
            change(record)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def change_samples(run_dir: Path, row: int, value: Any) -> None:
    file = run_dir / "samples_00000.json"
    samples = json.loads(file.read_text())
    samples["steps"]["3"][0][row] = value
    file.write_text(json.dumps(samples))


def flip_a_bit(run_dir: Path) -> None:
    """Change the last bit of a value in the final checkpoint's last tensor."""
    file = next(checkpoint(run_dir, 4).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)


CHANGES: dict[str, tuple[Callable[[Path], None], str, dict[str, str]]] = {
    # what is changed in the resumed run, kind -> the beginning of the departure
    "loss, by an ulp": (
        lambda run: change_metrics(run, lambda r: r.update(loss=r["loss"] * (1 + 2.3e-16))),
        SAME,
        {"loss": "loss of step 3: "},
    ),
    "loss": (
        lambda run: change_metrics(run, lambda r: r.update(loss=r["loss"] * (1 + 3e-6))),
        "plain",
        {"loss": "loss of step 3: "},
    ),
    "loss within its bound": (
        lambda run: change_metrics(run, lambda r: r.update(loss=r["loss"] * (1 + 1e-6))),
        "plain",
        {},
    ),
    "a loss that is no number": (
        lambda run: change_metrics(run, lambda r: r.update(loss=float("nan"))),
        "plain",
        {"loss": "loss of step 3: nan, not "},
    ),
    "norm": (
        lambda run: change_metrics(run, lambda r: r.update(grad_norm=r["grad_norm"] * 1.001)),
        "plain",
        {"norm": "norm of step 3: "},
    ),
    "rate, by an ulp": (
        lambda run: change_metrics(
            run, lambda r: r.update(learning_rate=r["learning_rate"] * (1 + 2.3e-16))
        ),
        "plain",
        {"rate": "rate of step 3: "},
    ),
    "sample": (
        lambda run: change_samples(run, 0, 99),
        "plain",
        {"samples": "step 3 read the samples 9-11, 99, not 8-11"},
    ),
    "tokens of a sample": (
        lambda run: change_samples(run, 1, "other"),
        "plain",
        {"samples": "step 3 read other tokens as sample 8"},
    ),
    "a bit of a tensor": (flip_a_bit, SAME, {"states": "exp_avg_sq of "}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_difference_has_its_row(kept: tuple[ResumeCheck, Path], name: str) -> None:
    check, folder = kept
    change, layout, expected = CHANGES[name]
    run_dir = folder / layout
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    change(run_dir)
    try:
        departures = verdict_of(check, layout, folder).departures
    finally:
        for file, data in before.items():
            file.write_bytes(data)
    assert departures.keys() == expected.keys(), departures
    for kind, begin in expected.items():
        assert departures[kind].startswith(begin)
    assert verdict_of(check, layout, folder).departures == {}


def verdict_of(check: ResumeCheck, layout: str, folder: Path) -> ResumeVerdict:
    target = next(target for target in check.targets if target.name == layout)
    return compare(check, target, folder)


def test_samples_are_those_that_the_loader_handed_out(kept: tuple[ResumeCheck, Path]) -> None:
    """Each rank of the two has its half of every global batch of four."""
    files = sorted((kept[1] / UNINTERRUPTED).glob("samples_*.json"))
    first, second = (json.loads(file.read_text()) for file in files)
    assert [first["data_rank"], second["data_rank"]] == [0, 1]
    for step in range(1, 5):
        rows = [part["steps"][str(step)] for part in (first, second)]
        begin = 4 * (step - 1)
        assert [[number for number, _ in half] for half in rows] == [
            [begin, begin + 1],
            [begin + 2, begin + 3],
        ]


def test_the_whole_run_is_not_the_resumed_one_by_accident(kept: tuple[ResumeCheck, Path]) -> None:
    """The states differ between the steps that are compared."""
    check, folder = kept
    readers = []
    for step, name in ((check.at, "interrupted"), (check.steps, UNINTERRUPTED)):
        path = checkpoint(folder / name, step)
        readers.append(CheckpointReader(path, read_manifest(path)))
    for name in readers[0].manifest.tensors:
        assert not torch.equal(readers[0].read(name), readers[1].read(name)), name


def test_the_plain_engine_resumes_8_bit_states(small_data: Path, tmp_path: Path) -> None:
    """And DeepSpeed goes on from them, parameter by parameter at ZeRO-0, with equal codes."""
    pytest.importorskip("bitsandbytes")
    optimizer = {"type": "AdamW8bit", "params": {"lr": 1e-3, "min_8bit_size": 256}}
    alone = ("--world=1", "--set=train.engine=plain", "--ds_set=zero_optimization.stage=0")
    more = (f"--ds_set=optimizer={json.dumps(optimizer)}", "--layouts=zero0", "--json")
    out = StringIO()
    with redirect_stdout(out):
        code = resume_check(flags(tmp_path, small_data, *alone, *more))
    assert code == 0, out.getvalue()
    for layout in json.loads(out.getvalue())["layouts"]:
        assert layout["differences"]["loaded"] == 0
