"""Parameters, FLOPs and activation bytes of a model, from its shapes alone.

A multiply-add is two FLOPs. Only matrix products count, as usual for MFU (Chowdhery et al. 2022,
appendix B); norms, softmax and activations would add one or two per cent. `test_count.py` compares
these formulas with `numel`, torch's FLOP counter and the tensors that autograd saves.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fgpt.config.schema import ModelConfig, Shapes, block_window

AttentionCount = Literal["full", "causal"]
"""full: all T x T scores (nanoGPT's and PaLM's MFU), with a window T x window; causal: those that
the mask allows, T x T / 2 without a window.
"""


def n_params(config: ModelConfig) -> int:
    """Number of parameters; a tied head is counted once."""
    head = 0 if config.tied_head else config.vocab_size * config.d_model
    final_norm = _norm_params(config) if config.norm_place == "pre" else 0
    embedding = config.vocab_size * config.d_model + n_position_params(config)
    return embedding + config.n_layer * block_params(config) + final_norm + head


def n_position_params(config: ModelConfig) -> int:
    """Parameters of a learned position table, else 0."""
    return config.max_seq_len * config.d_model if config.position == "learned" else 0


def block_params(config: ModelConfig) -> int:
    """Parameters of one transformer block."""
    shapes = Shapes.of(config)
    biases = 0
    if config.bias:
        biases = shapes.d_qkv + config.d_model + _mlp_inputs(config) * shapes.d_ff + config.d_model
    qk_norms = 2 * shapes.d_head if config.qk_norm else 0
    return _block_matrix_params(config) + biases + qk_norms + 2 * _norm_params(config)


def _mlp_inputs(config: ModelConfig) -> int:
    """Number of the MLP's input projections: up, and SwiGLU's gate."""
    return 2 if config.activation == "swiglu" else 1


def _norm_params(config: ModelConfig) -> int:
    return config.d_model * (2 if config.norm == "layernorm" and config.bias else 1)


def _block_matrix_params(config: ModelConfig) -> int:
    shapes = Shapes.of(config)
    attention = config.d_model * (shapes.d_qkv + shapes.n_head * shapes.d_head)
    return attention + (_mlp_inputs(config) + 1) * config.d_model * shapes.d_ff


def forward_flops_per_token(
    config: ModelConfig, seq_len: int, attention: AttentionCount = "full"
) -> int:
    """FLOPs per token of a forward pass over `seq_len` tokens, head included."""
    shapes = Shapes.of(config)
    matrices = config.n_layer * _block_matrix_params(config) + config.vocab_size * config.d_model
    windows = (block_window(config, block) or seq_len for block in range(config.n_layer))
    keys = [min(window, seq_len) for window in windows]  # of each block
    per_key = 4 * shapes.n_head * shapes.d_head
    if attention == "full":
        return 2 * matrices + per_key * sum(keys)
    # on average w - w^2 / (2 T): the first w queries of a row attend to half of their window
    pairs = sum(n * (2 * seq_len - n) for n in keys)
    return 2 * matrices + (per_key * pairs // (2 * seq_len) if seq_len else 0)


def training_flops_per_token(
    config: ModelConfig,
    seq_len: int,
    attention: AttentionCount = "full",
    recompute: bool = False,
) -> int:
    """FLOPs per token of a forward and backward pass: 3 x forward.

    `recompute` adds a second forward pass of the blocks (hardware FLOPs, HFU; MFU leaves it out).
    """
    forward = forward_flops_per_token(config, seq_len, attention)
    recomputed = forward - 2 * config.vocab_size * config.d_model if recompute else 0
    return 3 * forward + recomputed


class SavedBytes(NamedTuple):
    """Bytes per token that a forward pass saves for the backward pass."""

    residual: int
    """On the residual stream: inputs of norms, dropout masks."""
    inner: int
    """Inside attention, MLP, head and loss."""


def activation_bytes(
    config: ModelConfig,
    micro_batch: int,
    seq_len: int,
    element_bytes: int,
    fused_loss: bool = False,
) -> int:
    """Return the bytes saved by one micro-batch, without recomputation (Korthikanti et al. 2022,
    section 4). `element_bytes`: 4 for fp32, 2 for bf16 and fp16; `fused_loss`: `fused_head_loss`.
    """
    block = sum(block_saved_bytes(config, element_bytes, seq_len))
    ends = *embedding_saved_bytes(config), *head_saved_bytes(config, element_bytes, fused_loss)
    per_batch = head_gradient_bytes(config) if fused_loss else 0
    return micro_batch * seq_len * (config.n_layer * block + sum(ends)) + per_batch


def embedding_saved_bytes(config: ModelConfig) -> SavedBytes:
    """Saved per token by the embedding: int64 ids, dropout mask."""
    return SavedBytes(residual=config.d_model if config.dropout > 0 else 0, inner=8)


def head_saved_bytes(
    config: ModelConfig, element_bytes: int, fused_loss: bool = False
) -> SavedBytes:
    """Saved per token by final norm, head and loss.

    With `fused_loss` no logits, but `head_gradient_bytes` once for all tokens.
    """
    stream = config.d_model * element_bytes
    final_norm = stream + _norm_statistics(config) if config.norm_place == "pre" else 0
    if fused_loss:
        return SavedBytes(residual=final_norm, inner=stream)  # gradient of the head's input
    # the head's input; cross entropy's float32 log-probabilities and int64 target; the cap's tanh
    n_tensors = 1 if config.logit_softcap is None else 2
    return SavedBytes(residual=final_norm, inner=stream + 4 * n_tensors * config.vocab_size + 8)


def head_gradient_bytes(config: ModelConfig) -> int:
    """Bytes of the head weight's float32 gradient, which `fused_head_loss` computes in the forward
    pass.
    """
    return 4 * config.vocab_size * config.d_model


def selective_saved_bytes(config: ModelConfig, element_bytes: int) -> int:
    """Saved per token by one block under selective ("cheap") recomputation, beside the block's
    input: the outputs of its projections and of fused attention.
    """
    shapes = Shapes.of(config)
    projections = shapes.d_qkv + 2 * config.d_model + _mlp_inputs(config) * shapes.d_ff
    saved = projections * element_bytes
    if fused_attention(config):
        saved += shapes.n_head * (shapes.d_head * element_bytes + 4)
    return saved


def block_saved_bytes(config: ModelConfig, element_bytes: int, n_keys: int) -> SavedBytes:
    """Saved per token by one block; a token attends to at most `n_keys` keys."""
    norms = 2 * (config.d_model * element_bytes + _norm_statistics(config))  # inputs
    masks = 2 * config.d_model if config.dropout > 0 else 0  # one byte per element
    # MLP: the input of up, and the hidden layer. relu: its output (enough for its gradient); gelu,
    # relu2: input and output; swiglu: gate, up, silu(gate) and the product
    copies = {"relu": 1, "gelu": 2, "relu2": 2, "swiglu": 4}[config.activation]
    mlp = (config.d_model + copies * Shapes.of(config).d_ff) * element_bytes
    return SavedBytes(norms + masks, _attention_saved_bytes(config, element_bytes, n_keys) + mlp)


def _attention_saved_bytes(config: ModelConfig, element_bytes: int, n_keys: int) -> int:
    shapes = Shapes.of(config)
    q_width, qk_heads = shapes.n_head * shapes.d_head, shapes.n_head + shapes.n_kv_head
    saved = (config.d_model + q_width) * element_bytes  # the inputs of qkv and out
    if config.qk_norm or config.position == "rotary":
        saved += qk_heads * shapes.d_head * element_bytes  # q and k a second time
    if config.qk_norm:
        saved += 4 * qk_heads  # float32 1/rms
    if fused_attention(config):
        # q, k, v; the log-sum-exp of each head's scores, or with dropout the hash of each query
        return saved + shapes.d_qkv * element_bytes + 4 * shapes.n_head
    # k and v repeated for each query head; the softmax, float32
    saved += 3 * q_width * element_bytes + 4 * shapes.n_head * n_keys
    if config.dropout > 0 or element_bytes < 4:
        saved += shapes.n_head * n_keys * element_bytes  # the weights that multiply v
    return saved + (shapes.n_head * n_keys if config.dropout > 0 else 0)


def fused_attention(config: ModelConfig) -> bool:
    """Whether training uses a kernel that does not materialize the scores (`sdpa_attention`)."""
    return config.attention == "sdpa"


def _norm_statistics(config: ModelConfig) -> int:
    """Bytes per token of a norm's float32 statistics: 1/std, and LayerNorm's mean."""
    return 8 if config.norm == "layernorm" else 4
