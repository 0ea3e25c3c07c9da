"""The model against its slow twins, transformers, and step-by-step decoding."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fgpt.config.presets import PRESETS
from fgpt.model.attention import reference_attention, sdpa_attention
from fgpt.model.context import BatchContext
from fgpt.model.gpt import GPT, decode_layers
from fgpt.model.init import initial_value, initialize
from fgpt.model.kv_cache import KVCache
from fgpt.model.mask import CAUSAL
from fgpt.model.position import Rotary, apply_rotary, sinusoidal_embedding
from fgpt.optim.build import has_weight_decay

TINY = replace(PRESETS["tiny"], vocab_size=96, n_layer=2, d_model=64, max_seq_len=32)
LLAMA = replace(
    PRESETS["llama-tiny"], vocab_size=96, n_layer=2, d_model=64, max_seq_len=32, qk_norm=True
)
VARIANTS = {
    "gpt2": TINY,
    "llama": LLAMA,
    "wide-heads": replace(TINY, d_head=80, n_head=3, d_ff=40),
    "one-kv-head": replace(TINY, n_kv_head=1, position="none"),
    "post-norm": replace(TINY, norm_place="post", activation="relu", position="sinusoidal"),
    "relu2": replace(TINY, activation="relu2", bias=False, norm="rmsnorm", tied_head=False),
}


def built(config, seed=0):
    model = GPT(config)
    initialize(model, config, seed)
    return model


def tokens(config, batch=2, length=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (batch, length or config.max_seq_len)
    return torch.randint(0, config.vocab_size, size, generator=generator)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("n_query", "n_key"), [(16, 16), (1, 16), (5, 16)])
def test_attention_kernels_agree_in_values_and_gradients(heads, n_query, n_key):
    generator = torch.Generator().manual_seed(1)
    n_head, n_kv_head = heads
    shapes = [(2, n_head, n_query, 8), (2, n_kv_head, n_key, 8), (2, n_kv_head, n_key, 8)]
    inputs = [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]
    weight = torch.randn(2, n_head, n_query, 8, generator=generator)
    results = []
    for kernel in (reference_attention, sdpa_attention):
        y = kernel(*inputs, CAUSAL)
        results.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_model_agrees_between_kernels(variant):
    config = VARIANTS[variant]
    ids = tokens(config)
    gradients = []
    for kernel in ("reference", "sdpa"):
        model = built(replace(config, attention=kernel))
        model(ids, ids.roll(-1, dims=1)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, slow in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], slow, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_a_later_one(variant):
    config = VARIANTS[variant]
    model = built(config).eval()
    ids = tokens(config)
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :20], before[:, :20], rtol=0, atol=0)
    assert not torch.equal(after[:, 20:], before[:, 20:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_the_cache_matches_the_full_forward_pass(variant):
    config = VARIANTS[variant]
    model = built(config).eval()
    ids = tokens(config, length=20)
    whole = model(ids)
    cache = KVCache(config, torch.zeros(2, dtype=torch.int64), 20, torch.float32)
    for start, end in [(0, 7), (7, 12), *((i, i + 1) for i in range(12, 20))]:
        step = model.decode(ids[:, start:end], cache)
        torch.testing.assert_close(step, whole[:, end - 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="holds 20 tokens, 1 more do not fit"):
        model.decode(ids[:, :1], cache)


def test_decoding_does_not_run_compiled_blocks():
    model, ids = built(TINY).eval(), tokens(TINY, length=20)
    wanted = model(ids)[:, -1]

    def refuse(*_):
        raise RuntimeError("compiled")

    for block in model.blocks:
        block.compile(backend=refuse)
    with pytest.raises(Exception, match="compiled"):
        model(ids)
    cache = KVCache(TINY, torch.zeros(len(ids), dtype=torch.int64), 20, torch.float32)
    torch.testing.assert_close(model.decode(ids, cache), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_row_decodes_as_alone(variant, fixed_shapes):
    config = VARIANTS[variant]
    model = built(config).eval()
    rows = [tokens(config, 1, n, seed=n)[0] for n in (17, 9, 1)]
    wanted = [model(row[None])[0] for row in rows]
    padding = torch.tensor([0, 8, 16])
    padded = torch.stack([F.pad(row, (17 - len(row), 0)) for row in rows])
    cache = KVCache(config, padding, 24, torch.float32)
    for start, end in [(0, 14), *((i, i + 1) for i in range(14, 17))]:
        columns = cache.advance(end - start)
        step = cache.step(columns, fixed_shapes=fixed_shapes)
        logits = decode_layers(model.layers(), padded[:, start:end], step)
        for row, begin in enumerate(padding.tolist()):
            if end > begin:
                wanted_logits = wanted[row][end - begin - 1]
                torch.testing.assert_close(logits[row], wanted_logits, rtol=1e-4, atol=1e-5)


def test_gpt2_is_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, n_layer=3)
    ours = built(config).eval()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ).eval()
    n_head, d_head = config.n_head, config.d_model // config.n_head

    def grouped(rows):  # theirs: all q, all k, all v; ours: q, k, v of each head in turn
        return rows.unflatten(0, (3, n_head, d_head)).transpose(0, 1).flatten(0, 2)

    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    state = theirs.transformer.state_dict()
    copy = {
        "embedding.token.weight": state["wte.weight"],
        "embedding.position.weight": state["wpe.weight"],
        "head.weight": state["wte.weight"],
        "final_norm.weight": state["ln_f.weight"],
        "final_norm.bias": state["ln_f.bias"],
    }
    for i in range(config.n_layer):
        for ours_name, theirs_name in names.items():
            for kind in ("weight", "bias"):
                value = state[f"h.{i}.{theirs_name}.{kind}"]
                value = value.t() if value.dim() == 2 else value  # theirs is a Conv1D
                value = grouped(value) if ours_name.endswith("qkv") else value
                copy[f"blocks.{i}.{ours_name}.{kind}"] = value
    ours.load_state_dict(copy)
    ids = tokens(config)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    loss = theirs(ids, labels=ids).loss
    torch.testing.assert_close(ours(ids[:, :-1], ids[:, 1:]), loss, rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_distance_only():
    rotary = Rotary(16, 10000.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def at(x: torch.Tensor, offset: int) -> torch.Tensor:
        return apply_rotary(x, *rotary.cos_sin(offset, 1, x.device, None))

    scores = [(at(q, i) * at(k, i - 3)).sum() for i in (3, 9, 30)]
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])
    # position 1, first pair: an angle of 1 radian
    x = torch.zeros(1, 1, 1, 16)
    x[..., 0] = 1
    once = at(x, 1)[0, 0, 0]
    assert once[0].item() == pytest.approx(math.cos(1))
    assert once[8].item() == pytest.approx(math.sin(1))


def test_rotary_stays_exact_in_a_bf16_model():
    model = built(LLAMA).bfloat16()
    model(tokens(LLAMA))
    cos, _ = model.blocks[0].attention.rotary.tables(8, torch.device("cpu"))
    assert cos.dtype == torch.float32


def test_sinusoidal_positions_are_the_papers_formula():
    table = sinusoidal_embedding(torch.arange(5), 6)
    for position in range(5):
        for j in range(3):
            angle = position / 10000 ** (2 * j / 6)
            assert table[position, 2 * j].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * j + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_initial_loss_is_log_vocabulary():
    config = replace(TINY, vocab_size=2048)
    ids = tokens(config, batch=8)
    loss = built(config)(ids, tokens(config, batch=8, seed=1)).item()
    assert loss == pytest.approx(math.log(2048), abs=0.1)


def test_initial_values_follow_the_seed_and_the_name_only():
    one, two, other = built(TINY), built(TINY), built(TINY, seed=1)
    # depth changes the residual projections' scale, nothing else, and no other layer's numbers
    deeper = built(replace(TINY, n_layer=8))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(two.named_parameters())[name])
        twin = dict(deeper.named_parameters())[name]
        residual = name.endswith(("out.weight", "down.weight"))
        torch.testing.assert_close(twin * (2 if residual else 1), parameter)
        if has_weight_decay(name, parameter.dim()):
            assert not torch.equal(parameter, dict(other.named_parameters())[name])


def test_initial_standard_deviations():
    config = replace(PRESETS["tiny"])
    for name, parameter in built(config).named_parameters():
        if not has_weight_decay(name, parameter.dim()):
            expected = 1.0 if name.endswith("norm.weight") else 0.0
            assert (parameter == expected).all(), name
            continue
        residual = name.endswith(("out.weight", "down.weight"))
        expected = 0.02 / math.sqrt(8) if residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
    with pytest.raises(ValueError, match="no initial value"):
        initial_value("blocks.0.surprise.weight", torch.Size([2, 2]), config, 0)


@pytest.mark.parametrize("n_segments", [1, 2])
def test_recomputation_changes_nothing(n_segments):
    from torch.utils.checkpoint import checkpoint

    config = replace(TINY, dropout=0.1)
    ids = tokens(config)
    gradients = []
    for recompute in (False, True):
        model = built(config)
        if recompute:
            model.checkpoint_activations(
                lambda run, x: checkpoint(run, x, use_reentrant=False), n_segments
            )
        torch.manual_seed(3)
        loss = model(ids, ids)
        loss.backward()
        gradients.append([loss, *(p.grad for p in model.parameters())])
    for saved, recomputed in zip(*gradients, strict=True):
        assert torch.equal(saved, recomputed)
    with pytest.raises(ValueError, match="do not divide into 3"):
        model.checkpoint_activations(checkpoint, 3)


def test_zero_residual_outputs_make_each_block_the_identity():
    config = replace(LLAMA, init_residual="zero")
    model, scaled = built(config), dict(built(LLAMA).named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            assert not parameter.any(), name
        else:
            assert torch.equal(parameter, scaled[name]), name
    ids = tokens(config)
    expected = F.rms_norm(model.embedding.token.weight[ids], (64,), eps=config.norm_eps)
    torch.testing.assert_close(model(ids), expected @ model.head.weight.T)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
def test_the_embedding_scale_is_a_factor_of_the_tokens_only(position):
    config = replace(TINY, position=position, embedding_scale=8.0)
    model, ids = built(config).eval(), tokens(config)
    expected = 8 * model.embedding.token.weight[ids]
    if position == "learned":
        expected = expected + model.embedding.position.weight
    elif position == "sinusoidal":
        expected = expected + sinusoidal_embedding(torch.arange(32), 64)
    torch.testing.assert_close(model.embedding(ids), expected)
    cache = KVCache(config, torch.zeros(2, dtype=torch.int64), 32, torch.float32)
    torch.testing.assert_close(model.decode(ids, cache), model(ids)[:, -1], rtol=1e-4, atol=1e-5)
    unscaled = built(replace(config, embedding_scale=1.0)).bfloat16().embedding(ids)
    assert unscaled.dtype == built(config).bfloat16().embedding(ids).dtype == torch.bfloat16


def test_tied_head_is_the_embedding():
    model = built(TINY)
    assert model.head.weight is model.embedding.token.weight
    untied = built(replace(TINY, tied_head=False))
    assert untied.head.weight is not untied.embedding.token.weight
    assert "head.weight" in dict(untied.named_parameters())


def test_dropout_acts_in_training_only():
    config = replace(TINY, dropout=0.5)
    model = built(config)
    ids = tokens(config)
    dropped = model(ids)
    model.context.current = BatchContext(step=1)
    assert not torch.equal(model(ids), dropped)
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_loss_is_the_mean_over_all_tokens():
    model = built(TINY).eval()
    ids = tokens(TINY)
    logits = model(ids)
    by_hand = -F.log_softmax(logits, -1).gather(-1, ids[..., None]).mean()
    torch.testing.assert_close(model(ids, ids), by_hand)
