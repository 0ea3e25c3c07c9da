"""Sliding windows: every kernel against the definition, decoding, and the blocks that have one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fgpt.config.schema import block_window
from fgpt.model import attention, count
from fgpt.model.attention import reference_attention, sdpa_attention
from fgpt.model.context import BatchContext
from fgpt.model.gpt import decode_layers
from fgpt.model.kernels import blocked_attention as blocked_module
from fgpt.model.kernels import masked_attention
from fgpt.model.kernels.blocked_attention import blocked_attention
from fgpt.model.kernels.masked_attention import dense_mask_attention, window_flash
from fgpt.model.kv_cache import KVCache
from fgpt.model.mask import CAUSAL, AttentionMask
from tests.model.test_documents import documents
from tests.model.test_gpt import LLAMA, TINY, built, tokens

CPU = torch.device("cpu")
WINDOW = replace(TINY, n_layer=4, window=5, window_pattern=3)
MODELS = {
    "every third block is full": WINDOW,
    "every block": replace(LLAMA, window=7),
    "one token": replace(TINY, position="rotary", window=1),
}


def inputs(n_token, heads=(4, 2), n_query=None, dtype=torch.float32, width=8, batch=2):
    generator = torch.Generator().manual_seed(n_token)
    sizes = [(heads[0], n_query or n_token), (heads[1], n_token), (heads[1], n_token)]
    return [
        torch.randn(batch, *size, width, generator=generator).to(dtype).requires_grad_()
        for size in sizes
    ]


def by_hand(q, k, v, allowed):
    """Attention in float64 with the mask `allowed`, bool [..., T, S]."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


def allowed_keys(n_query, n_key, window):
    """Query i, the last ones, sees key j if i - window < j <= i."""
    rows = range(n_key - n_query, n_key)
    return torch.tensor([[i - window < j <= i for j in range(n_key)] for i in rows])


def results(kernel, parts, *rest):
    y = kernel(*parts, *rest)
    return [y, *torch.autograd.grad(y.double().sin().sum(), parts)]


def slow_varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
    """Slow stand-in for torch's: query i sees the keys i - left .. i of its document."""
    left, right = window_size
    assert right == 0 and cu_q.dtype == torch.int32 and max_q == (cu_q[1:] - cu_q[:-1]).max()
    out = torch.empty_like(q)
    for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        n = b - a
        allowed = allowed_keys(n, n, n if left < 0 else left + 1)
        part = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        out[a:b] = by_hand(*part, allowed)[0].transpose(0, 1).to(q.dtype)
    return out


def test_the_mask_is_the_definition():
    for n_query, n_key, window in [(6, 6, 3), (2, 6, 3), (1, 6, 1), (4, 4, 9)]:
        mask = CAUSAL.within(window)
        assert torch.equal(mask.dense(n_query, n_key, CPU), allowed_keys(n_query, n_key, window)), (
            n_query,
            n_key,
            window,
        )
    assert CAUSAL.within(None) is CAUSAL and CAUSAL.window is None
    packed = documents([[3, 5], [8]])
    begins = packed.document_begins
    expected = [
        [[begin <= j and i - 3 < j <= i for j in range(8)] for i, begin in enumerate(row)]
        for row in begins.tolist()
    ]
    windowed = packed.within(3)
    assert windowed.dense(8, 8, CPU)[:, 0].tolist() == expected
    assert packed.within(3) is windowed and packed.within(None) is packed  # shared by the layers


KERNELS = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "blocked": blocked_attention,
    "dense": dense_mask_attention,
    "flash": window_flash,
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
@pytest.mark.parametrize(("n_token", "window"), [(16, 1), (16, 5), (16, 16), (16, 99), (200, 70)])
def test_kernels_agree_in_values_and_gradients(kernel, heads, n_token, window, monkeypatch):
    monkeypatch.setattr(masked_attention, "varlen_attn", slow_varlen_attn)
    parts = inputs(n_token, heads)
    slow = results(by_hand, parts, allowed_keys(n_token, n_token, window))
    fast = results(KERNELS[kernel], parts, AttentionMask(window=window))
    for expected, actual in zip(slow, fast, strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [reference_attention, sdpa_attention])
def test_the_queries_may_be_the_last_tokens(kernel):
    parts = inputs(16, n_query=5)
    slow = results(by_hand, parts, allowed_keys(5, 16, 4))
    for expected, actual in zip(slow, results(kernel, parts, CAUSAL.within(4)), strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


# blocks of 64, 128 and 256 queries; windows within one, over several, of all but one token
@pytest.mark.parametrize(
    ("n_token", "window"), [(300, 64), (300, 299), (700, 200), (700, 513), (700, 690), (130, 129)]
)
def test_blocks_agree_with_the_reference(n_token, window):
    parts, mask = inputs(n_token, batch=1), AttentionMask(window=window)
    slow, fast = (results(f, parts, mask) for f in (reference_attention, blocked_attention))
    for expected, actual in zip(slow, fast, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_bf16_error_is_close_to_the_references():
    parts, mask = inputs(600, dtype=torch.bfloat16, width=64), AttentionMask(window=100)
    exact = results(by_hand, parts, allowed_keys(600, 600, 100))
    slow, fast = (results(f, parts, mask) for f in (reference_attention, blocked_attention))
    for right, expected, actual in zip(exact, slow, fast, strict=True):
        error, reference_error = ((x.double() - right).norm() for x in (actual, expected))
        assert error <= 1.2 * reference_error and error < 2**-6 * right.norm()


def test_blocks_skip_keys_before_the_window(monkeypatch):
    """The products' sizes are counted: window + block keys at most, instead of all earlier ones."""
    n_keys = []
    weights = blocked_module._attention_weights

    def counted(queries, keys, *masks):
        n_keys.append(keys.shape[1])
        return weights(queries, keys, *masks)

    monkeypatch.setattr(blocked_module, "_attention_weights", counted)
    parts = inputs(1024, batch=1)
    results(blocked_attention, parts, AttentionMask(window=128))
    assert max(n_keys) == 128 - 1 + 64 and len(n_keys) == 2 * 1024 // 64  # forward and backward
    n_keys.clear()
    results(blocked_attention, parts, AttentionMask(window=1024))  # hides nothing
    assert max(n_keys) == 1024 and len(n_keys) == 2 * 1024 // 256


def test_the_operator_passes_opcheck():
    parts = inputs(130, dtype=torch.float64, width=4, batch=1)
    # tracing is checked by the compiled blocks below
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(blocked_module._forward, [*parts, 50], test_utils=checks)
    detached = [x.detach() for x in parts]
    inputs_and_grad = [torch.ones_like(parts[0]), *detached, 50]
    torch.library.opcheck(blocked_module._backward, inputs_and_grad, test_utils=checks)


def test_without_a_window_the_fast_kernels_are_those_of_before(monkeypatch):
    """Also with a window that hides nothing."""

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(attention, "window_attention", refuse)
    monkeypatch.setattr(AttentionMask, "dense", refuse)
    for mask in (CAUSAL, AttentionMask(window=16)):
        sdpa_attention(*inputs(16), mask)
    with pytest.raises(AssertionError):
        sdpa_attention(*inputs(16), AttentionMask(window=15))


def test_half_precision_without_fast_products_uses_the_explicit_mask(monkeypatch):
    monkeypatch.setattr(masked_attention, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(masked_attention, "blocked_attention", None)
    for dtype in (torch.float16, torch.bfloat16):
        parts = inputs(32, dtype=dtype)
        actual = sdpa_attention(*parts, AttentionMask(window=5))
        expected = by_hand(*parts, allowed_keys(32, 32, 5))
        torch.testing.assert_close(actual.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kernel", ["reference", "sdpa", "dense", "flash"])
def test_documents_within_a_window(kernel, monkeypatch):
    monkeypatch.setattr(masked_attention, "varlen_attn", slow_varlen_attn)
    kernels = {
        "reference": reference_attention,
        "sdpa": sdpa_attention,
        "dense": dense_mask_attention,
        "flash": lambda *a: masked_attention.pack_rows(masked_attention.varlen_flash, *a),
    }
    parts, mask = inputs(16), documents([[3, 5, 1, 7], [16]])
    allowed = mask.dense(16, 16, CPU) & allowed_keys(16, 16, 4)
    slow = results(by_hand, parts, allowed)
    for expected, actual in zip(slow, results(kernels[kernel], parts, mask.within(4)), strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_the_pattern_counts_blocks_from_the_first():
    assert [block_window(WINDOW, i) for i in range(6)] == [5, 5, None, 5, 5, None]
    assert [block_window(replace(WINDOW, window_pattern=None), i) for i in (0, 9)] == [5, 5]
    assert [block_window(TINY, i) for i in range(3)] == [None] * 3
    assert [b.attention.window for b in built(WINDOW).blocks] == [5, 5, None, 5]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_token_reaches_as_far_as_the_windows_of_all_blocks(config):
    """Its logits depend on the tokens up to n_layer x (window - 1) before it, or on all."""
    model, ids = built(config).eval(), tokens(config)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % config.vocab_size
    differs = (model(ids) != model(changed)).any(-1).all(0)
    is_full = None in [block_window(config, i) for i in range(config.n_layer)]
    last = 31 if is_full else 2 + config.n_layer * (config.window - 1)
    assert differs.tolist() == [2 <= i <= last for i in range(32)]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_whole_model_agrees_between_kernels(config):
    ids, gradients = tokens(config), []
    for kernel in ("reference", "sdpa"):
        model = built(replace(config, attention=kernel))
        loss = model(ids, ids.roll(-1, dims=1))
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for slow, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_with_the_cache_matches_the_full_forward_pass(config, fixed_shapes, padded):
    model = built(config).eval()
    lengths = (20, 9, 3) if padded else (20, 20)
    rows = [tokens(config, 1, n, seed=n + i)[0] for i, n in enumerate(lengths)]
    wanted = [model(row[None])[0] for row in rows]
    padding = torch.tensor([20 - n for n in lengths])
    ids = torch.stack([F.pad(row, (20 - len(row), 0)) for row in rows])
    cache = KVCache(config, padding, 24, torch.float32)
    for start, end in [(0, 8), (8, 17), *((i, i + 1) for i in range(17, 20))]:
        step = cache.step(cache.advance(end - start), fixed_shapes=fixed_shapes)
        logits = decode_layers(model.layers(), ids[:, start:end], step)
        for row, begin in enumerate(padding.tolist()):
            if end > begin:
                expected = wanted[row][end - begin - 1]
                torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


def test_decoding_a_token_reads_the_window_only(monkeypatch):
    sizes = []
    decode = attention.decode_attention

    def noted(q, k, v, mask):
        sizes.append((k.shape[2], mask))
        return decode(q, k, v, mask)

    monkeypatch.setattr(attention, "decode_attention", noted)
    config, ids = WINDOW, tokens(WINDOW)
    cache = KVCache(config, torch.zeros(2, dtype=torch.int64), 32, torch.float32)
    model = built(config).eval()
    model.decode(ids[:, :31], cache)
    sizes.clear()
    model.decode(ids[:, 31:], cache)
    assert sizes == [(5, None), (5, None), (32, None), (5, None)]


def test_recomputation_and_compiled_blocks_change_nothing():
    ids = tokens(WINDOW)
    packed = documents([[11, 21], [32]])
    expected = None
    for change in ("none", "recompute", "compile"):
        model = built(WINDOW)
        if change == "recompute":
            model.checkpoint_activations(lambda f, x: checkpoint(f, x, use_reentrant=False), 2)
        masks = [CAUSAL, packed]
        if change == "compile":  # documents are never compiled
            masks = [CAUSAL]
            for block in model.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        gradients = []
        for mask in masks:
            with model.context.activate(BatchContext(mask=mask)):
                loss = model(ids, ids)
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        expected = expected or gradients
        torch.testing.assert_close(gradients, expected[: len(masks)])


def test_flops_count_the_keys_in_the_windows():
    def scores(config, seq_len, kind):
        whole = count.forward_flops_per_token(config, seq_len, kind)
        return (whole - count.forward_flops_per_token(config, 0)) * seq_len

    n_layer, seq_len, width = 4, 32, 64  # H K
    # full: three blocks of 5 keys, one of 32
    assert scores(WINDOW, seq_len, "full") == 4 * width * seq_len * (3 * 5 + 32)
    # causal: pairs that the mask allows; the formula leaves out half of the diagonal
    pairs = sum(
        int(CAUSAL.within(block_window(WINDOW, i)).dense(seq_len, seq_len, CPU).sum())
        for i in range(n_layer)
    )
    diagonal = sum((block_window(WINDOW, i) or seq_len) / 2 for i in range(n_layer))
    counted = scores(WINDOW, seq_len, "causal") / (4 * width)
    assert counted == pytest.approx(pairs - diagonal, rel=1e-3)
    for kind in ("full", "causal"):  # a window that hides nothing
        assert scores(replace(WINDOW, window=32), seq_len, kind) == scores(
            replace(TINY, n_layer=4), seq_len, kind
        )
