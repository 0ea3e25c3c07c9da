"""Each parallel layer against the plain one: outputs and every gradient, on 2 and 4 ranks.

All ranks create the same full tensors; each computes its shard and compares it with that shard of
the plain result. Both column-parallel projections are compared with the same result.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fgpt.config.schema import ModelConfig
from fgpt.engine.deepspeed.ops import init_communication
from fgpt.model.attention import reference_attention, sdpa_attention
from fgpt.model.embedding import Head
from fgpt.model.linear import Linear
from fgpt.model.mask import CAUSAL
from fgpt.parallel.tensor.collectives import all_to_all
from fgpt.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy
from fgpt.parallel.tensor.layers import (
    ColumnParallelProjection,
    RowParallelLinear,
    UlyssesAttention,
    UnfusedColumnParallelProjection,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from tests.ranks import run_ranks

B, T, D, F_ = 3, 8, 12, 16
SIZES = pytest.mark.parametrize("n", [2, 4])
SEQUENCE = pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaf(tensor):
    return tensor.clone().requires_grad_()


def shard(tensor, dim, rank, n):
    return tensor.chunk(n, dim=dim)[rank]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def linear(weight, bias):
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    layer.bias = None if bias is None else nn.Parameter(bias.clone())
    return layer


def two_linear_layers(x, layers):
    """Two linear layers with a common input, and a loss of both outputs."""
    outputs = [F.linear(x, w, b) for w, b in layers]
    (outputs[0] * outputs[1].square()).sum().backward()
    return outputs


def check_columns(world, sequence, biased, kind):
    n, rank, group = world.size, world.rank, dist.group.WORLD
    weights = [leaf(randn(F_, D, seed=s)) for s in (1, 2)]
    biases = [leaf(randn(F_, seed=s)) if biased else None for s in (3, 4)]
    x = leaf(randn(B, T, D))
    expected = two_linear_layers(x, list(zip(weights, biases, strict=True)))

    x_local = leaf(shard(x.detach(), 1, rank, n) if sequence else x.detach())
    layers = [
        linear(shard(w.detach(), 0, rank, n), None if b is None else shard(b.detach(), 0, rank, n))
        for w, b in zip(weights, biases, strict=True)
    ]
    actual = kind(group, sequence)(x_local, *layers)
    (actual[0] * actual[1].square()).sum().backward()
    for output, full, layer, w, b in zip(actual, expected, layers, weights, biases, strict=True):
        assert_same(output, shard(full, 2, rank, n))
        assert_same(layer.weight.grad, shard(w.grad, 0, rank, n))
        if b is not None:
            assert_same(layer.bias.grad, shard(b.grad, 0, rank, n))
    assert_same(x_local.grad, shard(x.grad, 1, rank, n) if sequence else x.grad)


@pytest.mark.dist
@pytest.mark.timeout(120)
@SIZES
@SEQUENCE
@pytest.mark.parametrize("kind", [ColumnParallelProjection, UnfusedColumnParallelProjection])
def test_columns(n, sequence, kind):
    for biased in (True, False):
        run_ranks(check_columns, n, sequence, biased, kind)


def check_rows(world, sequence):
    n, rank, group = world.size, world.rank, dist.group.WORLD
    weight, bias, x = leaf(randn(D, F_, seed=1)), leaf(randn(D, seed=2)), leaf(randn(B, T, F_))
    expected = F.linear(x, weight, bias)
    expected.square().sum().backward()

    layer = RowParallelLinear(
        linear(shard(weight.detach(), 1, rank, n), bias.detach()), group, sequence
    )
    x_local = leaf(shard(x.detach(), 2, rank, n))
    actual = layer(x_local)
    actual.square().sum().backward()
    assert_same(actual, shard(expected, 1, rank, n) if sequence else expected)
    assert_same(x_local.grad, shard(x.grad, 2, rank, n))
    assert_same(layer.weight.grad, shard(weight.grad, 1, rank, n))
    if sequence:  # partial gradient: the bias is added to T/N tokens on each rank
        dist.all_reduce(layer.bias.grad)
    assert_same(layer.bias.grad, bias.grad)


@pytest.mark.dist
@pytest.mark.timeout(120)
@SIZES
@SEQUENCE
def test_rows(n, sequence):
    run_ranks(check_rows, n, sequence)


def check_embedding(world, sequence):
    n, rank, group = world.size, world.rank, dist.group.WORLD
    vocab = 4 * n - 1  # the last rank has a row of padding
    table = leaf(randn(vocab, D, seed=1))
    ids = torch.arange(B * T).view(B, T) % vocab
    expected = F.embedding(ids, table)
    expected.square().sum().backward()

    padded = torch.cat([table.detach(), torch.zeros(1, D, dtype=table.dtype)])
    plain = nn.Embedding(4, D)
    plain.weight = nn.Parameter(shard(padded, 0, rank, n).clone())
    layer = VocabParallelEmbedding(plain, vocab, group, sequence)
    actual = layer(ids)
    actual.square().sum().backward()
    assert_same(actual, shard(expected, 1, rank, n) if sequence else expected)
    assert_same(layer.weight.grad, shard(torch.cat([table.grad, torch.zeros(1, D)]), 0, rank, n))
    for invalid in (-1, vocab, 70_000):
        with pytest.raises(IndexError, match=f"do not lie in 0 .. {vocab - 1}"):
            layer(torch.full((B, T), invalid))


@pytest.mark.dist
@pytest.mark.timeout(120)
@SIZES
@SEQUENCE
def test_embedding(n, sequence):
    run_ranks(check_embedding, n, sequence)


def check_loss(world, vocab):
    """Logits of a sharded vocabulary with padding, against torch's cross entropy; with a z-loss the
    value is the same, and the gradient is that of the sum.
    """
    n, rank, group = world.size, world.rank, dist.group.WORLD
    rows = -(-vocab // n)
    logits = leaf(20 * randn(B, T, vocab, seed=1))
    targets = torch.arange(B * T).view(B, T) % vocab
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (3 * expected).backward()

    padding = torch.full((B, T, rows * n - vocab), 1e9, dtype=torch.float64)
    x_local = leaf(shard(torch.cat([logits.detach(), padding], dim=2), 2, rank, n))
    actual = vocab_parallel_cross_entropy(x_local, targets, vocab, group)
    (3 * actual).backward()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    full = torch.cat([logits.grad, torch.zeros_like(padding)], dim=2)
    torch.testing.assert_close(x_local.grad, shard(full, 2, rank, n), rtol=1e-5, atol=1e-7)
    z_loss = 0.1 * logits.flatten(0, 1).logsumexp(dim=1).square().mean()
    (3 * z_loss).backward()  # adds to the gradient of the cross entropy
    x_local.grad = None
    actual = vocab_parallel_cross_entropy(x_local, targets, vocab, group, z_loss=0.1)
    (3 * actual).backward()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    full = torch.cat([logits.grad, torch.zeros_like(padding)], dim=2)
    torch.testing.assert_close(x_local.grad, shard(full, 2, rank, n), rtol=1e-5, atol=1e-7)
    with pytest.raises(IndexError, match="do not lie in"):
        vocab_parallel_cross_entropy(x_local, targets + 1, vocab, group)


@pytest.mark.dist
@pytest.mark.timeout(120)
@SIZES
@pytest.mark.parametrize("vocab", [16, 13, 5])
def test_cross_entropy(n, vocab):
    run_ranks(check_loss, n, vocab)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def check_heads(world, sequence, kind):
    for softcap in (None, 4.0):
        check_head(world, sequence, kind, softcap)


def check_head(world, sequence, kind, softcap):
    n, rank, group = world.size, world.rank, dist.group.WORLD
    weight, x = leaf(randn(F_, D, seed=1)), leaf(randn(B, T, D))
    expected = 4 * torch.tanh(F.linear(x, weight) / 4) if softcap else F.linear(x, weight)
    expected.square().sum().backward()
    plain = Head(ModelConfig(vocab_size=F_ // n, d_model=D, logit_softcap=softcap), None)
    plain.weight = nn.Parameter(shard(weight.detach(), 0, rank, n).clone())
    head = VocabParallelHead(plain, kind(group, sequence))
    x_local = leaf(shard(x.detach(), 1, rank, n) if sequence else x.detach())
    actual = head(x_local)
    actual.square().sum().backward()
    same = close if softcap else assert_same  # the cap is computed in float32
    same(actual, shard(expected, 2, rank, n))
    same(head.weight.grad, shard(weight.grad, 0, rank, n))
    same(x_local.grad, shard(x.grad, 1, rank, n) if sequence else x.grad)


@pytest.mark.dist
@pytest.mark.timeout(120)
@SEQUENCE
@pytest.mark.parametrize("kind", [ColumnParallelProjection, UnfusedColumnParallelProjection])
def test_head(sequence, kind):
    run_ranks(check_heads, 2, sequence, kind)


def check_ulysses(world):
    """Grouped heads, causal: both kernels under Ulysses against the kernel on all tokens."""
    n, rank, group = world.size, world.rank, dist.group.WORLD
    heads, groups, width = 8, 4, 6
    for kernel in (reference_attention, sdpa_attention):
        q = leaf(randn(B, heads, T, width, seed=1))
        k, v = (leaf(randn(B, groups, T, width, seed=s)) for s in (2, 3))
        expected = kernel(q, k, v, CAUSAL)
        expected.square().sum().backward()
        x_local = [leaf(shard(x.detach(), 2, rank, n)) for x in (q, k, v)]
        actual = UlyssesAttention(kernel, group)(*x_local, CAUSAL)
        actual.square().sum().backward()
        torch.testing.assert_close(actual, shard(expected, 2, rank, n))
        for local, full in zip(x_local, (q, k, v), strict=True):
            torch.testing.assert_close(local.grad, shard(full.grad, 2, rank, n))


@pytest.mark.dist
@pytest.mark.timeout(120)
@SIZES
def test_ulysses(n):
    run_ranks(check_ulysses, n)


def check_all_to_all(world):
    """Against the all-to-all of DeepSpeed's UlyssesAttention."""
    from deepspeed.sequence.layer import single_all_to_all

    init_communication("cpu")
    x = randn(B, 4, 4, D, seed=world.rank)  # (B, H, T / N, K)
    ours = all_to_all(x, 1, 2, dist.group.WORLD)  # (B, H / N, T, K)
    theirs = single_all_to_all(x.transpose(1, 2), 2, 1, 0, dist.group.WORLD)  # [B, T, H, K]
    assert torch.equal(ours, theirs.transpose(1, 2))


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_all_to_all_is_deepspeeds():
    run_ranks(check_all_to_all, 2)
