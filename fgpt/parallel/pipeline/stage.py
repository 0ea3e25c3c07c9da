"""A GPT's layers as the stages of DeepSpeed's pipeline.

DeepSpeed schedules, sends and receives; a stage computes a contiguous range of `GPT.layers()`. The
GPT is built on the meta device, and each rank allocates only the layers of its stage.

A tied head is one parameter in two stages, as the token embedding's weight in the first and the
head's in the last. DeepSpeed sums the gradients of the two copies; `sync_tied_weights` keeps the
copies equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from fgpt.model.context import BatchContext
from fgpt.model.gpt import GPT
from fgpt.parallel.topology import Grid

TIED_WEIGHTS = {"embedding": "token.weight", "head": "weight"}
"""Layer -> its name of the parameter that a tied head shares."""
TIED_PARAMETER = "embedding." + TIED_WEIGHTS["embedding"]
"""Logical name of that parameter."""


class PipelineStage(PipelineModule):
    """The layers bounds[s] : bounds[s + 1] of a GPT, on a rank of stage s."""

    def __init__(self, gpt: GPT, bounds: Sequence[int], grid: Grid):
        """`gpt`: on the meta device, with parallel layers, loss and recomputation already set.

        All ranks call this together. Parameters are allocated, not initialized.
        """
        layers, tied = gpt.layers(), gpt.config.tied_head
        # 1. describe all layers; DeepSpeed builds those of this stage
        super().__init__(
            [_layer_spec(name, layer, tied) for name, layer in layers.items()],
            topology=PipeModelDataParallelTopology(grid.pp, grid.tp, grid.replicas),
            loss_fn=gpt.loss,
            partition_method=list(bounds),
        )
        self.tied = tied
        # 2. this stage's layers by name
        names = list(layers)[self._local_start : self._local_stop]
        self.layers: dict[str, nn.Module] = dict(zip(names, self.forward_funcs, strict=True))
        # 3. for training: the same, with checkpointed blocks
        self.training_layers = gpt.checkpoint_blocks(list(self.forward_funcs))
        self.context = gpt.context
        self.batch_contexts: Iterator[BatchContext] = iter(())
        """Contexts of the next forward passes, in order; set by the engine."""

    def _partition_layers(self, method: Any) -> None:
        """Set this stage's bounds; DeepSpeed's version would build all layers to count them."""
        self.parts = method
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(method[stage], method[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """Without gradients; otherwise torch warns about the broadcast."""
        super()._synchronize_tied_weights()

    def sync_tied_weights(self) -> None:
        """Broadcast the first stage's copy of a tied weight; all ranks call this together."""
        self._synchronize_tied_weights()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] ids, or [B, T, D] from the previous stage -> [B, T, D], or logits [B, T, V].

        Recomputes the same blocks as `GPT.forward`. DeepSpeed's own recomputation gives the first
        stage no gradients, because ids do not require any.
        """
        # 1. DeepSpeed runs forward passes in micro-batch order: take the next context
        with self.context.activate(next(self.batch_contexts)):
            # 2. run this stage's layers
            for layer in self.training_layers if self.training else self.forward_funcs:
                x = layer(x)
        return x


def logical_parameters(stage: PipelineStage) -> dict[str, nn.Parameter]:
    """Return this stage's parameters by their names in a GPT.

    A tied head's weight has the name of the token embedding's, in the last stage too.
    """
    return {
        TIED_PARAMETER if stage.tied and layer == "head" else f"{layer}.{name}": parameter
        for layer, module in stage.layers.items()
        for name, parameter in module.named_parameters()
    }


def _layer_spec(name: str, layer: nn.Module, tied: bool) -> LayerSpec:
    """Describe a layer on the meta device; building it allocates memory, without values."""
    if tied and name in TIED_WEIGHTS:
        spec = TiedLayerSpec("embedding", type(layer), tied_weight_attr=TIED_WEIGHTS[name])
    else:
        spec = LayerSpec(type(layer))
    spec.build = lambda log=False: layer.to_empty(device="cpu")  # DeepSpeed moves it to its device
    return spec
