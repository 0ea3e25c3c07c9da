"""A checkpoint of any layout resumes at any other.

python -m tests.checkpoint.test_layouts    prints the table of README.md (six minutes)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.cli.run_flags import request_of
from fgpt.cli.train import parser
from fgpt.config.resolve import resolve
from fgpt.distributed.launch import World
from fgpt.engine.build import build_engine
from fgpt.prepare.pipeline import prepare
from tests.checkpoint.saved import assert_same_tensors, load_engine, save_engine, state_of
from tests.prepare.corpora import small_recipe, write_corpus
from tests.ranks import run_ranks
from tests.tiny import Tiny, train_all, zero

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

AT, LAST = 2, 4
"""The step of the checkpoint; the last step."""
CLOSE = {"fp32": 1e-6, "bf16": 2e-4}
"""Largest relative difference of a loss, if one of the layouts has this precision."""
BF16 = {"bf16": {"enabled": True}}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# name -> (ranks, DeepSpeed JSON, flags)
LAYOUTS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "plain": (1, {}, ("--set=train.engine=plain",)),
    **{f"z{stage}": (2, zero(stage), ()) for stage in range(4)},
    "z2 round robin": (2, zero(2, round_robin_gradients=True), ()),
    "z2 offload": (2, zero(2, **OFFLOAD), ()),
    "z3 offload": (2, zero(3, **OFFLOAD), ()),
    "z3 groups": (2, zero(3, sub_group_size=5000), ()),
    "tp2": (2, zero(1), ("--tp=2",)),
    "pp2": (2, zero(0), ("--pp=2",)),
    "cp2": (2, zero(2), ("--cp=2",)),
    "tp2 pp2": (4, zero(1), ("--tp=2", "--pp=2")),
    "tp2 sequence dp2": (4, zero(1), ("--tp=2", "--sequence")),
    "tp2 dp2 z3": (4, zero(3), ("--tp=2",)),
    **{f"bf16 z{stage}": (2, zero(stage) | BF16, ()) for stage in (1, 2, 3)},
    **{f"bf16 z{stage} sums": (2, zero(stage) | BF16 | SUMS, ()) for stage in (1, 2)},
    "bf16 pp2 sums": (2, zero(0) | BF16 | SUMS, ("--pp=2",)),
}
Job = tuple[str, str, tuple[object, ...]]
"""Run, layout, further flags."""


class Matrix:
    """Runs of all layouts in one folder."""

    def __init__(self, folder: Path, data: Path):
        self.tiny = Tiny(folder, data)

    def flags(self, job: Job) -> list[str]:
        """The command line of a job: dropout, an odd vocabulary, and a head that is tied."""
        run, layout, more = job
        _, changes, flags = LAYOUTS[layout]
        ds = self.tiny.ds(layout, **changes)
        text = json.loads(ds.read_text())
        del text["train_micro_batch_size_per_gpu"]
        ds.write_text(json.dumps(text | {"train_batch_size": 8}))
        odd = ("--set=model.vocab_size=405", "--set=model.dropout=0.1")
        return self.tiny.flags(run, *flags, *odd, "--steps", LAST, *more, ds=ds)

    def train(self, jobs: Sequence[Job]) -> None:
        """Run the jobs, those with as many ranks in the same processes."""
        for ranks, chosen in by_ranks(jobs):
            runs = [self.flags(job) for job in chosen]
            outcomes = run_ranks(train_all, ranks, runs, timeout_s=900)[0]
            failed = [(j, o.error) for j, o in zip(chosen, outcomes, strict=True) if o.code]
            assert not failed, failed

    def checkpoint(self, layout: str) -> Path:
        """The checkpoint of step AT that a layout saved."""
        return self.tiny.checkpoint(layout, AT)

    def resume(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Resume what the first layout of each pair saved at the second one."""
        self.train([(f"{a} at {b}", b, ("--resume", self.checkpoint(a))) for a, b in pairs])

    def difference(self, saved: str, resumed: str) -> float:
        """Largest relative difference of a resumed run's losses and those without interruption."""
        mine = self.tiny.losses(f"{saved} at {resumed}")
        whole = dict(self.tiny.losses(saved))
        assert [step for step, _ in mine] == list(range(AT + 1, LAST + 1))
        return max(abs(loss - whole[step]) / whole[step] for step, loss in mine)


def by_ranks(jobs: Iterable[Job]) -> list[tuple[int, list[Job]]]:
    """(number of ranks, the jobs of layouts with that many)."""
    numbers = sorted({LAYOUTS[layout][0] for _, layout, _ in jobs})
    return [(n, [job for job in jobs if LAYOUTS[job[1]][0] == n]) for n in numbers]


def close(*layouts: str) -> float:
    """The bound for a resume among these layouts."""
    return CLOSE["bf16" if any("bf16" in layout for layout in layouts) else "fp32"]


@pytest.fixture(scope="module")
def matrix(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Every layout's own run."""
    matrix = Matrix(tmp_path_factory.mktemp("layouts"), small_data)
    matrix.train([(layout, layout, ()) for layout in LAYOUTS])
    return matrix


def load_and_save(world: World, jobs: Sequence[tuple[list[str], Path, Path]]) -> None:
    """Load each checkpoint into a new engine, and save it elsewhere at once."""
    for flags, source, root in jobs:
        resolved = resolve(request_of(parser().parse_args(flags)), world=world.size, device="cpu")
        engine = build_engine(resolved, world, torch.device("cpu"))
        load_engine(engine, world, source)
        save_engine(engine, world, root)
        engine.close()


RING = list(zip(LAYOUTS, [*list(LAYOUTS)[7:], *list(LAYOUTS)[:7]], strict=True))
"""Each layout as the first and the second of a pair once."""


def test_what_is_loaded_is_saved_again_bit_for_bit(matrix: Matrix) -> None:
    """Weights and states, through any layout: float32 masters lose nothing."""
    jobs: list[Job] = [(f"again {a} at {b}", b, ()) for a, b in RING]
    pairs = dict(zip([run for run, _, _ in jobs], RING, strict=True))
    for ranks, chosen in by_ranks(jobs):
        run_ranks(
            load_and_save,
            ranks,
            [
                (matrix.flags(job), matrix.checkpoint(pairs[job[0]][0]), matrix.tiny.path(job[0]))
                for job in chosen
            ],
            timeout_s=120,
        )
    for run, (a, _) in pairs.items():
        assert_same_tensors(matrix.tiny.path(run) / f"step_{AT:08d}", matrix.checkpoint(a))


def test_resumed_at_another_layout(matrix: Matrix) -> None:
    matrix.resume(RING)
    for a, b in RING:
        assert matrix.difference(a, b) < close(a, b), (a, b)


def test_three_changes_of_layout(matrix: Matrix) -> None:
    """More and fewer ranks, other axes, offload, another engine: the same run."""
    layouts = ("z2", "tp2 pp2", "plain", "z3 offload")
    for i, layout in enumerate(layouts):
        resume = ("--resume", "auto") if i else ()
        more = ("--steps", 2 * (i + 1), *resume)
        matrix.train([("changes", layout, more)])
    matrix.train([("whole", "plain", ("--steps", 8))])
    mine, whole = matrix.tiny.records("changes"), matrix.tiny.records("whole")
    assert [r["step"] for r in mine] == list(range(1, 9))
    for a, b in zip(mine, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=CLOSE["fp32"])
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    final = state_of(matrix.tiny.checkpoint("changes", 8))
    for (name, state), tensor in state_of(matrix.tiny.checkpoint("whole", 8)).items():
        # a key's bias moves no attention: its gradient is rounding, which Adam enlarges
        if not name.endswith("qkv.bias"):
            mine_, where = final[name, state], f"{name} {state}"
            torch.testing.assert_close(mine_, tensor, rtol=1e-3, atol=2e-5, msg=where)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_layout_at_every_other(matrix: Matrix) -> None:
    pairs = [(a, b) for a in LAYOUTS for b in LAYOUTS]
    matrix.resume(pairs)
    for a, b in pairs:
        bound = 0.0 if a == b else close(a, b)
        assert matrix.difference(a, b) <= bound, (a, b)


def table(difference: Callable[[str, str], float]) -> str:
    """The differences in Markdown: a row for each saved layout."""
    rows = [["saved at", *LAYOUTS], ["---"] * (len(LAYOUTS) + 1)]
    for a in LAYOUTS:
        values = [difference(a, b) for b in LAYOUTS]
        rows.append([a, *("0" if value == 0 else f"{value:.0e}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(small_recipe(write_corpus(Path(folder) / "texts")), data, progress=False)
        matrix = Matrix(Path(folder), data)
        matrix.train([(layout, layout, ()) for layout in LAYOUTS])
        matrix.resume([(a, b) for a in LAYOUTS for b in LAYOUTS])
        print(table(cache(matrix.difference)))


if __name__ == "__main__":
    main()
