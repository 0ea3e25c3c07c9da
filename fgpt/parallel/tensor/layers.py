"""Tensor-parallel layers, which replace the plain ones on each rank, and Ulysses attention.

A column-parallel layer holds some of the outputs: it needs the full input, and each rank computes
one term of the input's gradient. A row-parallel layer holds some of the inputs: the ranks' outputs
are summed. With `sequence` each rank holds T/N tokens outside these layers: inputs are gathered and
sums are scattered, which together cost as much as one all-reduce.

N ranks, T tokens (T/N per rank where sequence-parallel), D d_model, I and O inputs and outputs of a
layer on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.model.attention import AttentionKernel
from fgpt.model.embedding import Head, cap_logits, scaled
from fgpt.model.linear import Linear, LinearFunction
from fgpt.model.mask import AttentionMask
from fgpt.parallel.tensor.collectives import (
    Group,
    all_to_all,
    copy_to_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from fgpt.parallel.tensor.cross_entropy import check_ids, local_vocab_ids


class ColumnParallelProjection:
    """Column-parallel layers with a common input: an `InputProjection` (`fgpt.model.linear`).

    The backward pass communicates the input's gradient while it computes the weights' gradients.
    The gathered input is saved; Megatron-LM gathers it again (Korthikanti et al., section 4.2.2).
    The slow twin is `UnfusedColumnParallelProjection`.
    """

    def __init__(self, group: Group, sequence: bool):
        self.group, self.sequence = group, sequence

    def __call__(self, x: Tensor, *layers: Linear) -> Sequence[Tensor]:
        """[B, T, D], or [B, T/N, D] with `sequence` -> [B, T, O] per layer."""
        parameters = (p for layer in layers for p in (layer.weight, layer.bias))
        return self.apply_linear(x, layers[0].project, *parameters)

    def apply_linear(
        self, x: Tensor, project: LinearFunction, *parameters: Any
    ) -> Sequence[Tensor]:
        """The same for weight, bias (or None), weight, bias, ... instead of layers."""
        return _ColumnParallelFunction.apply(x, self.group, self.sequence, project, *parameters)


class UnfusedColumnParallelProjection(ColumnParallelProjection):
    """The same without overlap, differentiated by autograd.

    For ZeRO-3, which gathers a layer's weight when the layer is called.
    """

    def __call__(self, x: Tensor, *layers: Linear) -> Sequence[Tensor]:
        """As `ColumnParallelProjection`."""
        x = self._copy_or_gather(x)
        return [layer(x) for layer in layers]

    def apply_linear(
        self, x: Tensor, project: LinearFunction, *parameters: Any
    ) -> Sequence[Tensor]:
        """As `ColumnParallelProjection`."""
        x = self._copy_or_gather(x)
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        return [project(x, weight, bias) for weight, bias in pairs]

    def _copy_or_gather(self, x: Tensor) -> Tensor:
        if self.sequence:
            return gather_from_sequence_parallel_region(x, self.group)
        return copy_to_tensor_parallel_region(x, self.group)


class _ColumnParallelFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, sequence: bool, project: LinearFunction, *parameters: Any
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.sequence, ctx.project = group, sequence, project
        weights, biases = parameters[::2], parameters[1::2]
        # 1. gather the sequence shards
        full_x = start_all_gather(x, group).wait() if sequence else x  # (B, T, D)
        ctx.save_for_backward(full_x, *weights)
        ctx.has_bias = [bias is not None for bias in biases]
        # 2. multiply by this rank's rows of each weight: (B, T, O) each
        return tuple(project(full_x, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        full_x, *weights = ctx.saved_tensors
        # 1. this rank's term of the input's gradient, over all layers
        grad_x = ctx.project(grads[0], weights[0].t())  # (B, T, D)
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x = grad_x + ctx.project(grad, weight.t())
        # 2. start its sum over the ranks
        start = start_reduce_scatter if ctx.sequence else start_all_reduce
        pending = start(grad_x, ctx.group)
        # 3. meanwhile the gradients of weights [O, D] and biases [O]
        gradients: list[Tensor | None] = []
        flat_x = full_x.flatten(0, 1)  # (B T, D)
        for grad, has_bias in zip(grads, ctx.has_bias, strict=True):
            grad = grad.flatten(0, 1)  # (B T, O)
            gradients += [ctx.project(grad.t(), flat_x.t()), grad.sum(0) if has_bias else None]
        # 4. wait for the sum
        return pending.wait(), None, None, None, *gradients


def _reduce_or_scatter(x: Tensor, group: Group, sequence: bool) -> Tensor:
    """Sum [B, T, D] over the ranks; with `sequence` return this rank's tokens [B, T/N, D]."""
    if sequence:
        return reduce_scatter_to_sequence_parallel_region(x, group)
    return reduce_from_tensor_parallel_region(x, group)


class RowParallelLinear(nn.Module):
    """A row-parallel linear layer: this rank's columns of the weight, the full bias."""

    project: LinearFunction = staticmethod(F.linear)

    def __init__(self, layer: nn.Linear, group: Group, sequence: bool):
        """`layer`: holds this rank's shard; its parameters are reused."""
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.group, self.sequence = group, sequence

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, I] -> [B, T, D], or this rank's tokens [B, T/N, D] with `sequence`."""
        y = _reduce_or_scatter(self.project(x, self.weight), self.group, self.sequence)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """This rank's rows of the token embedding."""

    def __init__(self, embedding: nn.Embedding, vocab_size: int, group: Group, sequence: bool):
        """`embedding`: holds this rank's rows; `vocab_size`: of all ranks, without padding rows."""
        super().__init__()
        self.weight = embedding.weight
        self.vocab_size = vocab_size
        self.group, self.sequence = group, sequence

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T, D], or this rank's tokens [B, T/N, D] with `sequence`.

        Raises IndexError for an id outside the vocabulary.
        """
        check_ids(ids, self.vocab_size)
        n_rows = self.weight.shape[0]
        rows, is_local = local_vocab_ids(ids, self.group.rank() * n_rows, n_rows)
        embedded = F.embedding(rows, self.weight) * is_local[..., None]  # (B, T, D)
        return _reduce_or_scatter(embedded, self.group, self.sequence)


class VocabParallelHead(Head):
    """Logits of this rank's rows of the vocabulary, for `vocab_parallel_cross_entropy`."""

    def __init__(self, head: Head, projection: ColumnParallelProjection):
        """`head`: holds this rank's rows."""
        nn.Module.__init__(self)
        self.weight, self.softcap, self.scale = head.weight, head.softcap, head.scale
        self.projection = projection

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """[B, T, D], or [B, T/N, D] with `sequence` -> [B, T, V / N]."""
        assert targets is None  # the fused loss is off under tensor parallelism
        x = scaled(x, self.scale)
        logits = self.projection.apply_linear(x, self.project, self.weight, None)[0]
        return cap_logits(logits, self.softcap)


class UlyssesAttention:
    """Attention over tokens that N context-parallel ranks share (Jacobs et al. 2023,
    DeepSpeed-Ulysses). The slow twin is `kernel` on all tokens.
    """

    def __init__(self, kernel: AttentionKernel, group: Group):
        self.kernel, self.group = kernel, group

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: Any = None
    ) -> Tensor:
        """q [B, H, T/N, K], k and v [B, G, T/N, K], mask of all T tokens -> [B, H, T/N, K]."""
        # 1. from all heads of T/N tokens to H/N heads of all tokens
        q, k, v = (all_to_all(x, 1, 2, self.group) for x in (q, k, v))  # (B, H/N, T, K)
        # 2. attend within these heads
        y = self.kernel(q, k, v, mask, dropout)  # (B, H/N, T, K)
        # 3. back to all heads of T/N tokens
        return all_to_all(y, 2, 1, self.group)
