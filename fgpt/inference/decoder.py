"""Runs the layers of a model for generation: whole, or split over the ranks of a grid.

B rows, T newest tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.model.gpt import decode_layers
from fgpt.model.kv_cache import DecodeStep, KVCache
from fgpt.parallel.tensor.collectives import start_all_gather
from fgpt.parallel.tensor.local import local_config
from fgpt.parallel.topology import GridCoordinates, ProcessGroups

COMPILED_CAPACITY = 256
"""Compiled decoding rounds the capacity of a cache up to a multiple, so that few are compiled."""


class Decoder:
    """The layers of a whole model, in this process."""

    is_rank0 = True
    """Whether this rank gets the logits and chooses the tokens."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """`layers`: of `GPT.layers()`, in evaluation mode; `config`: of the whole model."""
        self.layers, self.config = layers, config
        self.device, self.dtype = device, dtype
        self.local_config = config
        prefix = "blocks."
        self._blocks = [int(n.removeprefix(prefix)) for n in layers if n.startswith(prefix)]
        self._fixed_step: Callable[..., Tensor] | None = None
        self._cache: KVCache | None = None

    def compile(self, *, cuda_graphs: bool) -> None:
        """Compile the step of one token per row; the shapes are then the same for every token.

        The slow twin is the step that is not compiled.
        """
        mode = "reduce-overhead" if cuda_graphs else None
        self._fixed_step = torch.compile(_FixedStep(self.layers), mode=mode, dynamic=False)

    def new_cache(self, padding: Sequence[int], capacity: int) -> KVCache:
        """Return an empty cache for rows with this much padding, valid until the next one."""
        if self._fixed_step is not None:
            columns = torch.tensor(padding, device=self.device)
            capacity = -(-capacity // COMPILED_CAPACITY) * COMPILED_CAPACITY
            # a CUDA graph reads and writes at the addresses that it was recorded with
            if self._cache is not None and self._cache.fits(columns, capacity):
                self._cache.restart(columns)
                return self._cache
        self._cache = self.new_prompt_cache(padding, capacity)
        if self._fixed_step is not None:
            self._cache.keep_addresses()
        return self._cache

    def new_prompt_cache(self, padding: Sequence[int], capacity: int) -> KVCache:
        """Return an empty cache that steps of several tokens, never compiled, may use."""
        columns = torch.tensor(padding, device=self.device)
        return KVCache(self.local_config, columns, capacity, self.dtype, self._blocks)

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor | None:
        """int64 [B, T], the newest tokens -> logits [B, V] of the next token, on rank 0."""
        columns = cache.advance(ids.shape[1])
        if self._fixed_step is not None and ids.shape[1] == 1:
            torch.compiler.cudagraph_mark_step_begin()
            return self._fixed_step(ids, columns, cache)
        return decode_layers(self.layers, ids, cache.step(columns))

    def logits(self, ids: Tensor) -> Tensor | None:
        """int64 [B, T], whole texts -> logits [B, T, V] of the token after each, on rank 0."""
        return decode_layers(self.layers, ids, self._whole(ids), every_token=True)

    def _whole(self, ids: Tensor) -> DecodeStep:
        """The step of all tokens of these texts; padding may follow them."""
        cache = self.new_prompt_cache([0] * len(ids), ids.shape[1])
        return cache.step(cache.advance(ids.shape[1]))

    def from_rank0(self, values: Tensor) -> Tensor:
        """Return rank 0's values, on every rank; those of the others give the shape."""
        return values


class _FixedStep(nn.Module):
    """The step of one token per row, in shapes and Python values that never change."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self._layers = dict(layers)

    def forward(self, ids: Tensor, columns: Tensor, cache: KVCache) -> Tensor:
        """ids int64 [B, 1], columns int64 [1] -> logits [B, V]."""
        return decode_layers(self._layers, ids, cache.step(columns, fixed_shapes=True))


class ParallelDecoder(Decoder):
    """This rank's layers of a model that tensor and pipeline ranks share.

    All ranks decode together, and rank 0 gets the logits.

    Data- and context-parallel ranks hold the same weights, and compute the same.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        groups: ProcessGroups,
    ):
        """`layers`: this rank's shard of its stage's; `config`: of the whole model."""
        super().__init__(layers, config, device, dtype)
        self.groups = groups
        self.local_config = local_config(config, groups.grid.tp)
        self.is_rank0 = dist.get_rank() == 0

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor | None:
        def run(x: Tensor) -> Tensor:
            return decode_layers(self.layers, x, cache.step(cache.advance(ids.shape[1])))

        return self._through_stages(ids, run, (len(ids), self.config.vocab_size))

    def logits(self, ids: Tensor) -> Tensor | None:
        size = (*ids.shape, self.config.vocab_size)
        step = self._whole(ids)
        return self._through_stages(
            ids, lambda x: decode_layers(self.layers, x, step, every_token=True), size
        )

    def _through_stages(
        self, ids: Tensor, run: Callable[[Tensor], Tensor], size: tuple[int, ...]
    ) -> Tensor | None:
        """Run this stage between its neighbours; the logits, of this size, arrive on rank 0."""
        groups, here = self.groups, self.groups.coordinates
        last = groups.grid.pp - 1
        # 1. this stage's input, from the stage before
        x = ids
        if here.pipe > 0:
            width = self.config.d_model
            x = torch.empty((*ids.shape, width), device=self.device, dtype=self.dtype)
            dist.recv(x, self._rank(here.pipe - 1, here.tensor), group=groups.model)
        # 2. its layers
        x = run(x)
        if here.pipe < last:
            dist.send(x.contiguous(), self._rank(here.pipe + 1, here.tensor), group=groups.model)
            return self._receive_logits(size) if here.pipe == here.tensor == 0 else None
        # 3. the logits of all tensor ranks' parts of the vocabulary, to the first stage
        if groups.tensor is not None:  # (..., V / N) -> (..., V), without padding
            parts = x.flatten(0, -2)[..., None]
            whole = start_all_gather(parts, groups.tensor).wait()[..., 0]
            x = whole[:, : self.config.vocab_size].view(size)
        if last > 0 and here.tensor == 0:
            dist.send(x.contiguous(), self._rank(0, 0), group=groups.model)
        return x

    def _receive_logits(self, size: tuple[int, ...]) -> Tensor:
        logits = torch.empty(size, device=self.device, dtype=self.dtype)
        dist.recv(logits, self._rank(self.groups.grid.pp - 1, 0), group=self.groups.model)
        return logits

    def _rank(self, pipe: int, tensor: int) -> int:
        """The rank there that has this rank's data."""
        here = self.groups.coordinates
        return self.groups.grid.rank(GridCoordinates(pipe, here.data, here.context, tensor))

    def from_rank0(self, values: Tensor) -> Tensor:
        dist.broadcast(values, 0)
        return values


def make_decoder(
    layers: Mapping[str, nn.Module],
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    groups: ProcessGroups | None,
) -> Decoder:
    """Return the decoder of layers that are split over `groups`; None: they are the whole model."""
    if groups is None:
        return Decoder(layers, config, device, dtype)
    return ParallelDecoder(layers, config, device, dtype, groups)
