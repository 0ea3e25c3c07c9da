"""The layers that a tensor-parallel rank has in place of the plain ones.

A column-split layer holds some of the outputs: its ranks need the whole input, and each knows only
its part of the input's gradient. A row-split layer holds some of the inputs: its ranks' outputs
are to be summed. With `sequence` the tokens between the two are shared out: whole inputs are
gathered, sums are scattered, and both cost together what one sum does.

N ranks, T tokens (each rank holds T/N of them where `sequence` is on), D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.model.attention import AttentionKernel
from fgpt.model.embedding import Head
from fgpt.model.linear import Linear, LinearFunction
from fgpt.model.mask import AttentionMask
from fgpt.parallel.tensor.collectives import (
    Group,
    copy_to_tensor_parallel_region,
    exchange,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    start_gather,
    start_scatter,
    start_sum,
)
from fgpt.parallel.tensor.cross_entropy import check_ids, local_vocab_ids


class ColumnParallelProjection:
    """Column-split layers of one input, in place of `fgpt.model.linear.apply_each`.

    The input's gradient travels while the weights' gradients are computed. The gathered input is
    kept for them; not keeping it would take another all-gather (Korthikanti et al., section 4.2.2).
    """

    def __init__(self, group: Group, sequence: bool):
        self.group, self.sequence = group, sequence

    def __call__(self, x: Tensor, *layers: Linear) -> Sequence[Tensor]:
        """[B, T, D], or [B, T/N, D] with `sequence` -> one [B, T, outputs / N] for each layer."""
        flat = (t for layer in layers for t in (layer.weight, layer.bias))
        return self.project(x, layers[0].project, *flat)

    def project(self, x: Tensor, project: LinearFunction, *flat: Any) -> Sequence[Tensor]:
        """The same for weight, bias (or None), weight, bias, ...; `project` multiplies."""
        return _ColumnParallelFunction.apply(x, self.group, self.sequence, project, *flat)


class UnfusedColumnParallelProjection(ColumnParallelProjection):
    """The same, one operation after the other and left to autograd.

    ZeRO-3 needs it: it gathers a layer's weight when the layer is called.
    """

    def __call__(self, x: Tensor, *layers: Linear) -> Sequence[Tensor]:
        """As `ColumnParallelProjection`."""
        x = self._whole(x)
        return [layer(x) for layer in layers]

    def project(self, x: Tensor, project: LinearFunction, *flat: Any) -> Sequence[Tensor]:
        """As `ColumnParallelProjection`."""
        x = self._whole(x)
        return [project(x, w, b) for w, b in zip(flat[::2], flat[1::2], strict=True)]

    def _whole(self, x: Tensor) -> Tensor:
        return (
            gather_from_sequence_parallel_region
            if self.sequence
            else copy_to_tensor_parallel_region
        )(x, self.group)


class _ColumnParallelFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, sequence: bool, project: LinearFunction, *flat: Any
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.sequence, ctx.project = group, sequence, project
        weights, biases = flat[::2], flat[1::2]
        whole = start_gather(x, group).wait() if sequence else x  # (B, T, D)
        ctx.save_for_backward(whole, *weights)
        ctx.biased = [bias is not None for bias in biases]
        return tuple(project(whole, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        whole, *weights = ctx.saved_tensors
        towards_x = ctx.project(grads[0], weights[0].t())
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            towards_x = towards_x + ctx.project(grad, weight.t())
        start = start_scatter if ctx.sequence else start_sum
        pending = start(towards_x, ctx.group)
        flat: list[Tensor | None] = []
        rows = whole.flatten(0, 1)  # (B T, D)
        for grad, biased in zip(grads, ctx.biased, strict=True):
            grad = grad.flatten(0, 1)  # (B T, outputs / N)
            flat += [ctx.project(grad.t(), rows.t()), grad.sum(0) if biased else None]
        return pending.wait(), None, None, None, *flat


class RowParallelLinear(nn.Module):
    """A row-split linear layer: this rank's columns of the weight, the whole bias."""

    project: LinearFunction = staticmethod(F.linear)

    def __init__(self, plain: nn.Linear, group: Group, sequence: bool):
        """`plain` holds this rank's part already; its parameters are taken over."""
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self.group, self.sequence = group, sequence

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, inputs / N] -> [B, T, D], or this rank's tokens [B, T/N, D] with `sequence`."""
        part = self.project(x, self.weight)
        y = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence
            else reduce_from_tensor_parallel_region
        )(part, self.group)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """This rank's rows of the token embedding."""

    def __init__(self, plain: nn.Embedding, vocab_size: int, group: Group, sequence: bool):
        """`vocab_size`: ids that there are on all ranks together, padding rows not counted."""
        super().__init__()
        self.weight = plain.weight
        self.vocab_size = vocab_size
        self.group, self.sequence = group, sequence

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T, D], or this rank's tokens [B, T/N, D] with `sequence`.

        Raises IndexError for an id that no rank holds.
        """
        check_ids(ids, self.vocab_size)
        n_rows = self.weight.shape[0]
        mine, here = local_vocab_ids(ids, self.group.rank() * n_rows, n_rows)
        part = F.embedding(mine, self.weight) * here[..., None]  # (B, T, D)
        return (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence
            else reduce_from_tensor_parallel_region
        )(part, self.group)


class VocabParallelHead(Head):
    """This rank's logits. `fgpt.parallel.tensor.cross_entropy` makes a loss of them."""

    def __init__(self, plain: Head, columns: ColumnParallelProjection):
        nn.Module.__init__(self)
        self.weight = plain.weight
        self.columns = columns

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """[B, T, D], or [B, T/N, D] with `sequence` -> [B, T, V / N]."""
        assert targets is None  # never `fused`
        return self.columns.project(x, self.project, self.weight, None)[0]


class UlyssesAttention:
    """Attention of tokens that N ranks share out (Jacobs et al. 2023, DeepSpeed-UlyssesAttention).

    Each rank gives its tokens of all heads for all tokens of its heads, attends, and trades back.
    """

    def __init__(self, kernel: AttentionKernel, group: Group):
        self.kernel, self.group = kernel, group

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: Any = None
    ) -> Tensor:
        """q [B, H, T/N, K], k and v [B, G, T/N, K] -> [B, H, T/N, K]."""
        q, k, v = (exchange(x, 1, 2, self.group) for x in (q, k, v))  # (B, H/N, T, K)
        return exchange(self.kernel(q, k, v, mask, dropout), 2, 1, self.group)
