"""Generation split over tensor and pipeline ranks against one process, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fgpt.checkpoint.boxes import Box
from fgpt.config.schema import ModelConfig
from fgpt.distributed.launch import World
from fgpt.errors import LaunchError, TrainingError
from fgpt.inference.load_decoder import check_grid, load_decoder
from fgpt.inference.source import SourceFacts
from fgpt.parallel.topology import Grid
from tests.inference.letters import CPU, DRAWN, GREEDY, decoder_of, generated, rows_of
from tests.model.test_gpt import LLAMA, TINY, VARIANTS, built
from tests.model.test_window import WINDOW
from tests.ranks import run_ranks

MODELS = {
    "gpt2": VARIANTS["gpt2"],
    "llama": VARIANTS["llama"],
    "relu2": VARIANTS["relu2"],
    "post-norm": VARIANTS["post-norm"],
    "window, scale and cap": replace(WINDOW, embedding_scale=8.0, logit_softcap=1.0),
}


class InitialWeights:
    """A `WeightSource` of a model with random weights; counts the elements that are read."""

    path = Path("random")
    facts = SourceFacts()

    def __init__(self, config: ModelConfig):
        self.config = config
        self.tensors = {name: p.detach() for name, p in built(config, seed=3).named_parameters()}
        self.n_read = 0

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def read(self, name: str) -> Tensor:
        raise AssertionError("no rank needs a whole tensor")

    def copy(self, name: str, box: Box, target: Tensor) -> None:
        whole = Box((0,) * len(self.shapes[name]), self.shapes[name])
        self.n_read += box.n
        target.copy_(self.tensors[name][box.slices_in(whole)])


def texts(world: World, grids: list[Grid]) -> list[Any]:
    """(grid, model) -> texts, greedy and drawn, and the elements read."""
    found = []
    for grid in grids:
        for config in MODELS.values():
            source = InitialWeights(config)
            decoder = load_decoder(source, grid, world, CPU, torch.float32)
            rows = rows_of(config)
            both = [generated(decoder, rows, sampling, seed=5) for sampling in (GREEDY, DRAWN)]
            found.append((both, source.n_read))
    return found


def check(n: int, grids: list[Grid]) -> None:
    results = run_ranks(texts, n, grids)
    wanted = []
    for config in MODELS.values():
        decoder, rows = decoder_of(built(config, seed=3)), rows_of(config)
        wanted.append([generated(decoder, rows, sampling, seed=5) for sampling in (GREEDY, DRAWN)])
    assert [both for both, _ in results[0]] == wanted * len(grids)
    sizes = [sum(t.numel() for t in InitialWeights(c).tensors.values()) for c in MODELS.values()]
    for rank, found in enumerate(results):
        assert rank == 0 or all(both == [[], []] for both, _ in found)
        for (_, n_read), size in zip(found, sizes * len(grids), strict=True):
            assert n_read < 0.8 * size  # of two, in a small model with a large vocabulary


def test_tp2_and_pp2_are_one_process() -> None:
    check(2, [Grid(tp=2), Grid(pp=2)])


def failure(world: World, grids: list[Grid]) -> list[str]:
    """grid -> the error of generating with a weight that is not a number."""
    messages = []
    for grid in grids:
        source = InitialWeights(TINY)
        source.tensors["final_norm.weight"][0] = float("nan")
        decoder = load_decoder(source, grid, world, CPU, torch.float32)
        with pytest.raises(TrainingError) as error:
            generated(decoder, rows_of(TINY), DRAWN)
        messages.append(str(error.value))
    return messages


def test_all_ranks_raise_together_if_logits_are_not_finite() -> None:
    own, other = run_ranks(failure, 2, [Grid(tp=2), Grid(pp=2)], timeout_s=40)
    assert own == other
    assert all(message.startswith("the logits are not finite") for message in own)


@pytest.mark.slow
def test_tp2_pp2_is_one_process() -> None:
    check(4, [Grid(tp=2, pp=2)])


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(tp=3), "--tp 3: does not divide the model's 4 query heads"),
        (Grid(tp=4), "--tp 4: does not divide the model's 2 key/value heads"),
        (Grid(pp=3), "--pp 3: the model has 2 blocks, at least one each"),
    ],
)
def test_a_grid_that_the_model_does_not_fit(grid: Grid, message: str) -> None:
    config = LLAMA if grid.tp == 4 else TINY
    with pytest.raises(LaunchError, match=message):
        check_grid(config, grid, grid.size)
    with pytest.raises(
        LaunchError, match=r"is for \d, and 1 run: start torchrun --nproc-per-node \d"
    ):
        check_grid(config, grid, 1)
