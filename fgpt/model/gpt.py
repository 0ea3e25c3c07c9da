"""The GPT: a list of layers and a for-loop, in plain torch.

B batch, T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.model.block import Block
from fgpt.model.context import ForwardContext
from fgpt.model.embedding import Head, InputEmbedding
from fgpt.model.kv_cache import DecodeStep, KVCache
from fgpt.model.norm import make_norm

CheckpointFunction = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""(function, x) -> function(x), whose activations are recomputed in the backward pass."""


def next_token_loss(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Mean cross entropy [] in nats, float32, of logits [B, T, V] and targets int64 [B, T].

    `z_loss`: see `ModelConfig`; it adds to the gradient, not to the value, so that losses compare
    with those of other runs (Chowdhery et al. 2022, section 5).
    """
    flat, target = logits.flatten(0, 1), targets.flatten()  # (B T, V), (B T)
    if z_loss == 0:  # a GPU's kernel reads fp16 itself
        return F.nll_loss(F.log_softmax(flat, dim=1, dtype=torch.float32), target)
    flat = flat.float()  # one gradient of both terms, rounded once
    # log(sum(exp(logits))) = loss + target's logit. Neither it nor the indexing, unlike logsumexp
    # and gather, saves a second tensor of all logits
    losses = F.cross_entropy(flat, target, reduction="none")
    log_sums = losses + flat[torch.arange(len(flat), device=flat.device), target]
    z_term = z_loss * log_sums.square().mean()
    return losses.mean() + (z_term - z_term.detach())


def decode_layers(
    layers: Mapping[str, nn.Module], x: Tensor, step: DecodeStep, *, every_token: bool = False
) -> Tensor:
    """Run consecutive layers of `GPT.layers()` on the newest tokens: all, or a pipeline stage's.

    Input and output: ids [B, T] before the embedding, [B, T, D] after a block, logits [B, V] after
    the head, or [B, T, V] with `every_token`.
    """
    for name, layer in layers.items():
        if isinstance(layer, Block) and layer.is_compiled:
            x = layer.forward(x, step)  # a compiled block would be recompiled for each length
        elif isinstance(layer, InputEmbedding | Block):
            x = layer(x, step)
        elif name == "final_norm":
            x = layer(x if every_token else x[:, -1:])  # (B, 1, D): the last token's
        else:
            x = layer(x)  # (B, T, V)
            x = x if every_token else x[:, 0]
    return x


class GPT(nn.Module):
    """A decoder-only transformer, described by `layers()` alone: forward passes, pipeline stages
    and the planner iterate over it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.context = ForwardContext()
        self.embedding = InputEmbedding(config, self.context)
        self.blocks = nn.ModuleList(Block(config, i, self.context) for i in range(config.n_layer))
        # the last post-norm block ends with a norm
        self.final_norm = make_norm(config) if config.norm_place == "pre" else nn.Identity()
        self.head = Head(config, self.embedding.token.weight if config.tied_head else None)
        self.loss: Callable[[Tensor, Tensor], Tensor] = partial(
            next_token_loss, z_loss=config.z_loss
        )
        self.recompute: CheckpointFunction | None = None
        self.n_segments = config.n_layer

    def layers(self) -> dict[str, nn.Module]:
        """Return the modules from ids [B, T] to logits [B, T, V], in order, by logical name."""
        blocks = {f"blocks.{i}": block for i, block in enumerate(self.blocks)}
        ends = {"final_norm": self.final_norm, "head": self.head}
        return {"embedding": self.embedding, **blocks, **ends}

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """int64 [B, T] -> logits [B, T, V], or with targets int64 [B, T] the mean loss []."""
        layers = list(self.layers().values())
        *body, head = self.checkpoint_blocks(layers) if self.training else layers
        x = ids
        for layer in body:
            x = layer(x)
        if targets is None:
            return head(x)
        # call the head, do not read its weight: ZeRO-3 gathers the weight in the module's hook
        return head(x, targets) if self.head.fused else self.loss(head(x), targets)

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """int64 [B, T], the newest tokens of each row -> logits [B, V] of the next token.

        The cache holds the earlier tokens; the newest ones are added to it. Raises ValueError if
        they do not fit. Deterministic in evaluation mode only.
        """
        columns = cache.advance(ids.shape[1])
        return decode_layers(self.layers(), ids, cache.step(columns))

    def checkpoint_activations(self, recompute: CheckpointFunction, n_segments: int) -> None:
        """In training, save only the input of each of `n_segments` equal segments of blocks.

        Raises ValueError if the blocks do not divide into them.
        """
        if not 1 <= n_segments <= len(self.blocks) or len(self.blocks) % n_segments:
            raise ValueError(f"{len(self.blocks)} blocks do not divide into {n_segments} segments")
        self.recompute, self.n_segments = recompute, n_segments

    def compile_blocks(self, mode: str | None = None) -> None:
        """Compile each block with torch.compile; all blocks share one graph, compiled once.

        `mode`: torch.compile's; "reduce-overhead" uses CUDA graphs.
        """
        for block in self.blocks:
            block.compile(mode=mode)
        if mode == "reduce-overhead":  # each forward pass reuses the graphs' memory
            self.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())

    def checkpoint_blocks(self, layers: Sequence[nn.Module]) -> list[Callable[..., Tensor]]:
        """Return consecutive layers of this model, with segments of blocks checkpointed if
        `checkpoint_activations` has been called. In a pipeline stage the last may be shorter.

        Recomputation activates the context of the original forward pass, so that dropout masks and
        attention masks are the same.
        """
        if self.recompute is None:
            return list(layers)
        recompute, context = self.recompute, self.context
        size = len(self.blocks) // self.n_segments

        def checkpointed(segment: nn.Module) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                current = context.current

                def run_segment(x: Tensor) -> Tensor:
                    with context.activate(current):
                        output: Tensor = segment(x)
                    return output

                return recompute(run_segment, x)

            return forward

        blocks = [layer for layer in layers if isinstance(layer, Block)]
        segments = (nn.Sequential(*blocks[i : i + size]) for i in range(0, len(blocks), size))
        begin = layers.index(blocks[0]) if blocks else len(layers)
        return [*layers[:begin], *map(checkpointed, segments), *layers[begin + len(blocks) :]]
