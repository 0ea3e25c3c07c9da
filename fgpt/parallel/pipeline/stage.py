"""A GPT's layers as the stages of DeepSpeed's pipeline.

DeepSpeed schedules, sends and receives; what a stage computes are the layers of `GPT.layers()` from
one bound to the next. The GPT is built on the meta device, where it costs nothing, and each rank
gives memory to the layers of its own stage only.

A tied head is one parameter in two places, the token embedding's weight in the first stage and the
head's in the last. DeepSpeed sums their
gradients; `PipelineStage.sync_tied_weights` keeps the copies equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from fgpt.model.context import BatchContext
from fgpt.model.gpt import GPT, checkpoint_blocks
from fgpt.parallel.topology import Grid

TIED = {"embedding": "token.weight", "head": "weight"}
"""Layer -> its name for the parameter that a tied head shares."""


class PipelineStage(PipelineModule):
    """The layers bounds[s] : bounds[s + 1] of a GPT, on a rank of stage s."""

    def __init__(self, gpt: GPT, bounds: Sequence[int], grid: Grid):
        """`gpt`: on the meta device, with the layers, loss and recomputation that it is to have.

        All ranks call this together. The parameters' values are left open.
        """
        layers, tied = gpt.layers(), gpt.config.tied_head
        super().__init__(
            [_spec(name, layer, tied) for name, layer in layers.items()],
            topology=PipeModelDataParallelTopology(grid.pp, grid.tp, grid.replicas),
            loss_fn=gpt.loss,
            partition_method=list(bounds),
        )
        self.tied = tied
        names = list(layers)[self._local_start : self._local_stop]
        self.layers: dict[str, nn.Module] = dict(zip(names, self.forward_funcs, strict=True))
        self.steps: list[Callable[[Tensor], Tensor]] = list(self.forward_funcs)
        if gpt.recompute is not None:
            size = gpt.config.n_layer // gpt.n_segments
            self.steps = checkpoint_blocks(self.forward_funcs, gpt.recompute, size, gpt.context)
        self.context = gpt.context
        self.batch_contexts: Iterator[BatchContext] = iter(())
        """What the coming forward passes are about, in their order; the engine says it."""

    def _partition_layers(self, method: Any) -> None:
        """Take the bounds; DeepSpeed's own builds each stage's layers to count them, and prints."""
        self.parts = method
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(method[stage], method[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """As DeepSpeed's, which would have torch warn of a gradient through the broadcast."""
        super()._synchronize_tied_weights()

    def sync_tied_weights(self) -> None:
        """Make the copies of a tied weight equal; the first stage's counts. All ranks call this."""
        self._synchronize_tied_weights()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] ids, or [B, T, D] of the stage before -> [B, T, D], in the end logits [B, T, V].

        Recomputes what `GPT.segments` would. DeepSpeed's own recomputation is not used: it gives
        a first stage no gradients, because ids need none.
        """
        with self.context.activate(next(self.batch_contexts)):
            for step in self.steps if self.training else self.forward_funcs:
                x = step(x)
        return x


def logical_parameters(stage: PipelineStage) -> dict[str, nn.Parameter]:
    """This rank's parameters by the names that they have in a GPT.

    A tied head's weight is the token embedding's in the last stage, too.
    """
    embedding = f"embedding.{TIED['embedding']}"
    return {
        embedding if stage.tied and layer == "head" else f"{layer}.{name}": parameter
        for layer, module in stage.layers.items()
        for name, parameter in module.named_parameters()
    }


def _spec(name: str, layer: nn.Module, tied: bool) -> LayerSpec:
    if tied and name in TIED:
        return _TiedLayer(layer, TIED[name])
    return _Layer(layer)


class _Layer(LayerSpec):
    """A layer on the meta device, given memory where it is built."""

    def __init__(self, layer: nn.Module):
        super().__init__(type(layer))
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module:
        return _in_memory(self.layer)


class _TiedLayer(TiedLayerSpec):
    """The same for a layer that shares its parameter `name` with one of another stage."""

    def __init__(self, layer: nn.Module, name: str):
        super().__init__("embedding", type(layer), tied_weight_attr=name)
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module:
        return _in_memory(self.layer)


def _in_memory(layer: nn.Module) -> nn.Module:
    """The layer with memory of its own; DeepSpeed moves it to its device."""
    return layer.to_empty(device="cpu")
