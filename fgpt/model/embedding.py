"""Input embedding and output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig, width_ratio
from fgpt.model.context import ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.kernels.fused_head_loss import ChunkLoss, fused_head_loss
from fgpt.model.kv_cache import DecodeStep
from fgpt.model.linear import Embedding, LinearFunction, scaled
from fgpt.model.position import sinusoidal_embedding


class InputEmbedding(nn.Module):
    """Scaled token embeddings plus, for learned and sinusoidal positions, position embeddings."""

    def __init__(self, config: ModelConfig, context: ForwardContext):
        super().__init__()
        self.context = context
        self.token = Embedding(config.vocab_size, config.d_model)
        self.position = (
            Embedding(config.max_seq_len, config.d_model) if config.position == "learned" else None
        )
        self.sinusoidal = config.position == "sinusoidal"
        self.scale = config.embedding_scale
        self.dropout = Dropout(config.dropout, 0, context)
        self.shard_index = 0
        """Index of the token embeddings' shard among the equal shards of the sequence."""

    def forward(self, ids: Tensor, step: DecodeStep | None = None) -> Tensor:
        """int64 [B, T] -> [B, T, D]; `step`: see `GPT.decode`."""
        x = scaled(self.token(ids), self.scale)  # (B, T, D)
        if self.position is None and not self.sinusoidal:
            return self.dropout(x)
        if step is not None:
            return self.dropout(self._add_positions(x, step.positions))
        start = self.shard_index * x.shape[1]
        end = start + x.shape[1]
        positions = self.context.current.positions  # (B, full row)
        index = torch.arange(start, end, device=ids.device)  # (T)
        if positions is not None:
            index = positions[:, start:end]  # (B, T)
        return self.dropout(self._add_positions(x, index))

    def _add_positions(self, x: Tensor, index: Tensor) -> Tensor:
        """Add the embeddings of positions [T] or [B, T] to x [B, T, D]."""
        if self.position is not None:
            return x + self.position(index)
        return x + sinusoidal_embedding(index, x.shape[-1]).to(x.dtype)


class Head(nn.Module):
    """Logits over the vocabulary; a tied head's `weight` is the token embedding's parameter."""

    fused = False
    """Whether the caller passes targets and gets the loss, without all logits in memory."""
    project: LinearFunction = staticmethod(F.linear)
    chunk_loss: ChunkLoss | None = None
    """What computes the fused loss between its products; None: without a compiler."""

    def __init__(self, config: ModelConfig, tied_to: Tensor | None):
        super().__init__()
        self.softcap, self.z_loss = config.logit_softcap, config.z_loss
        self.scale = 1 / width_ratio(config)
        if tied_to is None:
            tied_to = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.weight: Tensor = tied_to

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, V], or with targets int64 [B, T] the mean cross entropy []."""
        x = scaled(x, self.scale)
        if targets is None:
            return cap_logits(self.project(x, self.weight), self.softcap)
        return fused_head_loss(
            x,
            self.weight,
            targets,
            self.project,
            softcap=self.softcap,
            z_loss=self.z_loss,
            chunk_loss=self.chunk_loss,
        )


def cap_logits(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), computed in float32 (Gemma Team 2024, section 2); None: no cap."""
    if cap is None:
        return logits
    return (cap * torch.tanh(logits.float() / cap)).to(logits.dtype)
