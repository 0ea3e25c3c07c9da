"""Attached auxiliary losses: the gradients of adding them to the total loss, in every setting that
a block runs in.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from fgpt.config.presets import PRESETS
from fgpt.model.auxiliary_loss import attach_auxiliary_loss
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.model.mlp import Mlp

TINY = replace(PRESETS["tiny"], vocab_size=96, n_layer=2, d_model=32, max_seq_len=16)
IDS = torch.arange(32).view(2, 16)
WEIGHT = 0.3


class Router(nn.Module):
    """An MLP behind a stand-in for a router, with a balance loss of its probabilities."""

    def __init__(self, mlp: Mlp, attach: bool):
        super().__init__()
        self.mlp, self.attach, self.losses = mlp, attach, []
        self.router = nn.Parameter(torch.linspace(-1, 1, 4 * 32).view(4, 32))

    def forward(self, x):
        probabilities = (x.float() @ self.router.float().t()).softmax(-1)  # (B, T, 4)
        loss = 4 * probabilities.mean((0, 1)).square().sum()
        if self.attach:
            return self.mlp(attach_auxiliary_loss(x, loss, WEIGHT))
        self.losses.append(loss)
        return self.mlp(x)


def build(attach, dtype=torch.float32):
    model = GPT(TINY)
    initialize(model, TINY, seed=0)
    for block in model.blocks:
        block.mlp = Router(block.mlp, attach)
    return model.to(dtype)


def gradients(model, loss):
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def added(dtype=torch.float32):
    """Gradients of the plain sum: main loss + WEIGHT x each block's auxiliary loss."""
    model = build(False, dtype)
    loss = model(IDS, IDS)
    return gradients(model, loss + WEIGHT * sum(x for b in model.blocks for x in b.mlp.losses))


def check(actual, expected, **tolerance):
    assert all("router" not in name or grad.any() for name, grad in actual.items())
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, **tolerance, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_sum(dtype):
    model = build(True, dtype)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
    check(gradients(model, model(IDS, IDS)), added(dtype), **tolerance)


def test_the_forward_pass_is_unchanged():
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(attach_auxiliary_loss(x, x.sum(), 2.0), x)
    assert torch.equal(build(True)(IDS, IDS), build(False)(IDS, IDS))


def test_a_bf16_activation_takes_a_float32_gradient_into_the_loss():
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    scale = torch.tensor(1 + 2**-20)  # rounds to 1 in bf16
    attach_auxiliary_loss(x, (weight * 3).sum(), scale).sum().backward()
    assert weight.grad.tolist() == [float(3 * scale)] * 2
    assert x.grad.tolist() == [1, 1]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["torch", "reentrant"])
def test_recomputed_blocks(use_reentrant):
    """DeepSpeed's checkpointing is of the reentrant kind: no graph in the first forward pass."""
    model = build(True)

    def recompute(function, x):
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=use_reentrant)

    model.checkpoint_activations(recompute, 2)
    check(gradients(model, model(IDS, IDS)), added())


def test_compiled_blocks():
    model = build(True)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    model(IDS[:, :-1], IDS[:, 1:])  # another length: the next compilation is of symbolic sizes
    check(gradients(model, model(IDS, IDS)), added())


def test_pipeline_stages():
    """Between two stages, one tensor goes forward and its gradient goes back."""
    model = build(True)
    sent = model.blocks[0](model.embedding(IDS))
    received = sent.detach().requires_grad_()
    loss = model.loss(model.head(model.final_norm(model.blocks[1](received))), IDS)
    loss.backward()
    sent.backward(received.grad)
    check({name: p.grad for name, p in model.named_parameters()}, added())
