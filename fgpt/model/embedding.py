"""Input embedding and output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.model.context import ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.kernels.fused_head_loss import fused_head_loss
from fgpt.model.linear import Embedding, LinearFunction
from fgpt.model.position import sinusoidal_table


class InputEmbedding(nn.Module):
    """Token embeddings plus, for learned and sinusoidal positions, position embeddings."""

    def __init__(self, config: ModelConfig, context: ForwardContext):
        super().__init__()
        self.context = context
        self.token = Embedding(config.vocab_size, config.d_model)
        self.position = (
            Embedding(config.max_seq_len, config.d_model) if config.position == "learned" else None
        )
        self.sinusoidal = config.position == "sinusoidal"
        self.dropout = Dropout(config.dropout, 0, context)
        self.shard_index = 0
        """Index of the token embeddings' shard among the equal shards of the sequence."""

    def forward(self, ids: Tensor, offset: int = 0) -> Tensor:
        """int64 [B, T] -> [B, T, D]; `offset`: column of the first token."""
        x = self.token(ids)  # (B, T, D)
        if self.position is None and not self.sinusoidal:
            return self.dropout(x)
        start = offset + self.shard_index * x.shape[1]
        end = start + x.shape[1]
        positions = self.context.current.positions  # (B, full row)
        index = torch.arange(start, end, device=ids.device)  # (T)
        if positions is not None:
            index = positions[:, start:end]  # (B, T)
        if self.position is not None:
            x = x + self.position(index)
        if self.sinusoidal:
            length = end if positions is None else positions.shape[1]
            table = sinusoidal_table(length, x.shape[-1], ids.device)
            x = x + table[index].to(x.dtype)
        return self.dropout(x)


class Head(nn.Module):
    """Logits over the vocabulary; a tied head's `weight` is the token embedding's parameter."""

    fused = False
    """Whether the caller passes targets and gets the loss, without all logits in memory."""
    project: LinearFunction = staticmethod(F.linear)

    def __init__(self, config: ModelConfig, tied_to: Tensor | None):
        super().__init__()
        if tied_to is None:
            tied_to = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.weight: Tensor = tied_to

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, V], or with targets int64 [B, T] the mean cross entropy []."""
        if targets is None:
            return self.project(x, self.weight)
        return fused_head_loss(x, self.weight, targets, self.project)
