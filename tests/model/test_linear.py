"""Matrix products through oneDNN against torch's, and the choice between the two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fgpt.config.presets import PRESETS
from fgpt.model import cpu_features
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.model.kernels.fused_head_loss import fused_head_loss
from fgpt.model.linear import onednn_linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
)


def results(project, x, weight, bias, grad_y):
    """The output and the gradients."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = project(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


@needs_onednn
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", [(1, 1, 3, 5), (2, 7, 33, 65), (3, 50, 48, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_onednn_agrees_with_torch(dtype, size, biased):
    batch, tokens, n_in, n_out = size
    generator = torch.Generator().manual_seed(0)
    # not contiguous, like the output of attention
    x = torch.randn(tokens, batch, n_in, generator=generator).to(dtype).transpose(0, 1)
    weight = torch.randn(n_out, n_in, generator=generator).to(dtype)
    bias = torch.randn(n_out, generator=generator).to(dtype) if biased else None
    grad_y = torch.randn(tokens, batch, n_out, generator=generator).to(dtype).transpose(0, 1)
    slow, fast = (results(f, x, weight, bias, grad_y) for f in (F.linear, onednn_linear))
    for expected, actual in zip(slow, fast, strict=True):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_only_needed_gradients_are_computed():
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    onednn_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 3))
    assert weight.grad is None


@needs_onednn
def test_whole_models_agree():
    config = replace(PRESETS["tiny"], vocab_size=97, n_layer=2, d_model=64, max_seq_len=32)
    ids = torch.randint(0, 97, (3, 33), generator=torch.Generator().manual_seed(0))
    gradients = []
    for project in (F.linear, onednn_linear):
        model = GPT(config)
        initialize(model, config, seed=0)
        model.head.fused = True
        for module in model.modules():
            if hasattr(module, "project"):
                module.project = project
        model(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-7, msg=name)


@needs_onednn
def test_the_fused_loss_uses_the_given_product():
    calls = []

    def project(*args):
        calls.append([tuple(t.shape) for t in args])
        return onednn_linear(*args)

    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    fused_head_loss(x, weight, torch.zeros(2, 5, dtype=torch.int64), project)
    assert calls[0] == [(10, 8), (11, 8)]
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_f": True, "cpu_name": "Intel(R) Xeon(R) Platinum 8488C"}, False),
        ({"avx512_f": False, "cpu_name": "AMD EPYC 7571"}, False),
        ({"avx512_f": True}, False),
        ({"sve": True, "cpu_name": "Neoverse V2"}, False),
    ],
    ids=str,
)
def test_the_choice_follows_from_the_cpu(capabilities, expected, monkeypatch):
    monkeypatch.setattr(cpu_features, "CAPABILITIES", capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu_features.prefers_onednn() is expected
    assert cpu_features.multiplies_bf16() is False
