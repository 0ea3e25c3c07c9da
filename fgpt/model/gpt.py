"""The GPT: a list of layers and a for-loop.

B batch, T tokens, D d_model, V vocabulary. Plain torch: no ranks, no groups, no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.model.block import Block
from fgpt.model.context import ForwardContext
from fgpt.model.embedding import Head, InputEmbedding
from fgpt.model.kv_cache import LayerCache
from fgpt.model.norm import make_norm

CheckpointFunction = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""Runs a function of the residual stream without keeping its activations."""


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats, in float32: logits [B, T, V], targets int64 [B, T] -> []."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class GPT(nn.Module):
    """`layers()` is the only description of the model; everything else walks it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.context = ForwardContext()
        self.embedding = InputEmbedding(config, self.context)
        self.blocks = nn.ModuleList(Block(config, i, self.context) for i in range(config.n_layer))
        # A post-norm block ends in a norm already.
        self.final_norm = make_norm(config) if config.norm_place == "pre" else nn.Identity()
        self.head = Head(config, self.embedding.token.weight if config.tied_head else None)
        self.loss: Callable[[Tensor, Tensor], Tensor] = next_token_loss
        self.recompute: CheckpointFunction | None = None
        self.n_segments = config.n_layer
        self.compiled = False

    def layers(self) -> dict[str, nn.Module]:
        """[B, T] ids -> ... -> [B, T, V] logits, one module after the other, by logical name."""
        blocks = {f"blocks.{i}": block for i, block in enumerate(self.blocks)}
        ends = {"final_norm": self.final_norm, "head": self.head}
        return {"embedding": self.embedding, **blocks, **ends}

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """int64 [B, T] -> logits [B, T, V], or with targets int64 [B, T] the mean loss [].

        With a cache, `ids` are the newest tokens, the earlier ones are in it, and the result is
        the logits [B, V] of the token after them.
        """
        if cache is not None:
            return self._decode(ids, cache)
        *steps, head = self.segments() if self.training else self.layers().values()
        x = ids
        for step in steps:
            x = step(x)
        if targets is None:
            return head(x)
        # a call of the head either way: that is where ZeRO-3 gathers its weight
        return head(x, targets) if self.head.fused else self.loss(head(x), targets)

    def _decode(self, ids: Tensor, cache: Sequence[LayerCache]) -> Tensor:
        x = self.embedding(ids, offset=cache[0].length)  # (B, T, D)
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            # compiled, a block would be compiled anew for each length of the cache
            x = (block.forward if self.compiled else block)(x, layer_cache)
        return self.head(self.final_norm(x[:, -1:]))[:, 0]  # (B, 1, D) -> (B, V)

    def checkpoint_activations(self, recompute: CheckpointFunction, n_segments: int) -> None:
        """In training, keep only the input of each of `n_segments` equal runs of blocks."""
        if not 1 <= n_segments <= len(self.blocks) or len(self.blocks) % n_segments:
            raise ValueError(f"{len(self.blocks)} blocks do not divide into {n_segments} segments")
        self.recompute, self.n_segments = recompute, n_segments

    def compile_blocks(self, mode: str | None = None) -> None:
        """Have torch.compile take each block: one graph, compiled once, for all of them.

        `mode`: torch.compile's; "reduce-overhead" replays CUDA graphs.
        """
        self.compiled = True
        for block in self.blocks:
            block.compile(mode=mode)
        if mode == "reduce-overhead":  # a graph's memory is used again from forward pass on
            self.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())

    def segments(self) -> list[Callable[..., Tensor]]:
        """`layers()`, with the blocks behind `recompute` if there is one."""
        layers = list(self.layers().values())
        if self.recompute is None:
            return list(layers)
        return recomputed(layers, self.recompute, len(self.blocks) // self.n_segments, self.context)


def recomputed(
    layers: Sequence[nn.Module], recompute: CheckpointFunction, size: int, context: ForwardContext
) -> list[Callable[..., Tensor]]:
    """These layers, with their blocks in runs of `size` behind `recompute`; the last run may be
    shorter. `context`: what is recomputed drops what was dropped.
    """

    def checkpointed(run: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            current = context.current

            def then(x: Tensor) -> Tensor:
                with context.activate(current):
                    output: Tensor = run(x)
                return output

            return recompute(then, x)

        return forward

    blocks = [layer for layer in layers if isinstance(layer, Block)]
    runs = (nn.Sequential(*blocks[i : i + size]) for i in range(0, len(blocks), size))
    first = layers.index(blocks[0]) if blocks else len(layers)
    return [*layers[:first], *map(checkpointed, runs), *layers[first + len(blocks) :]]
