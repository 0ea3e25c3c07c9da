"""The two ends of the model: ids to vectors, vectors to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig
from fgpt.model.context import ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.kernels.fused_head_loss import head_loss
from fgpt.model.linear import Embedding, Project
from fgpt.model.position import sinusoidal_table


class InputEmbedding(nn.Module):
    """Token vectors plus, for absolute positions, position vectors."""

    def __init__(self, config: ModelConfig, context: ForwardContext):
        """`context`: the model's."""
        super().__init__()
        self.context = context
        self.token = Embedding(config.vocab_size, config.d_model)
        self.position = (
            Embedding(config.max_seq_len, config.d_model) if config.position == "learned" else None
        )
        self.sinusoidal = config.position == "sinusoidal"
        self.dropout = Dropout(config.dropout, 0, context)
        self.shard_index = 0
        """Which of the equal parts of the sequence the token vectors are."""

    def forward(self, ids: Tensor, offset: int = 0) -> Tensor:
        """int64 [B, T] -> [B, T, D]; the first token stands at position `offset`."""
        x = self.token(ids)  # (B, T, D)
        start = offset + self.shard_index * x.shape[1]
        end = start + x.shape[1]
        given = self.context.current.positions  # (B, whole row)
        if self.position is not None:
            row = torch.arange(start, end, device=ids.device)
            x = x + self.position(row if given is None else given[:, start:end])
        if self.sinusoidal:
            table = sinusoidal_table(
                end if given is None else given.shape[1], x.shape[-1], ids.device
            )
            x = x + (table[start:] if given is None else table[given[:, start:end]]).to(x.dtype)
        return self.dropout(x)


class Head(nn.Module):
    """Logits over the vocabulary; tied, `weight` is the token embedding's own parameter."""

    fused = False
    """Whether training and evaluation ask it for the loss, which then never holds all logits."""
    project: Project = staticmethod(F.linear)

    def __init__(self, config: ModelConfig, tied_to: Tensor | None):
        super().__init__()
        if tied_to is None:
            tied_to = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.weight: Tensor = tied_to

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, V], or with targets int64 [B, T] the mean cross entropy []."""
        if targets is None:
            return self.project(x, self.weight)
        return head_loss(x, self.weight, targets, self.project)
