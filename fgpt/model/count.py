"""Parameters, FLOPs and activation bytes of a model, from its shapes alone.

A multiply-add is two FLOPs. Only matrix products are counted, as is usual for MFU (Chowdhery et al.
2022, appendix B); norms, softmax and activations are a per cent or two more. `test_count.py` holds
these against `numel`, torch's FLOP counter and what autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fgpt.config.schema import ModelConfig, Shapes

AttentionCount = Literal["full", "causal"]
"""full: all T x T scores (nanoGPT's and PaLM's MFU). causal: only the half a causal model needs."""


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
        biases = shapes.d_qkv + config.d_model + _mlp_in(config) * shapes.d_ff + config.d_model
    qk_norms = 2 * shapes.d_head if config.qk_norm else 0
    return _block_matrix_params(config) + biases + qk_norms + 2 * _norm_params(config)


def _mlp_in(config: ModelConfig) -> int:
    """How many projections lead into the MLP: up, and SwiGLU's gate."""
    return 2 if config.activation == "swiglu" else 1


def _norm_params(config: ModelConfig) -> int:
    return config.d_model * (2 if config.norm == "layernorm" and config.bias else 1)


def _block_matrix_params(config: ModelConfig) -> int:
    shapes = Shapes.of(config)
    attention = config.d_model * (shapes.d_qkv + shapes.n_head * shapes.d_head)
    return attention + (_mlp_in(config) + 1) * config.d_model * shapes.d_ff


def forward_flops_per_token(
    config: ModelConfig, seq_len: int, attention: AttentionCount = "full"
) -> int:
    """FLOPs of one token's forward pass in a sequence of `seq_len` tokens, head included."""
    shapes = Shapes.of(config)
    matrices = config.n_layer * _block_matrix_params(config) + config.vocab_size * config.d_model
    scores_and_mix = 4 * seq_len * shapes.n_head * shapes.d_head * config.n_layer
    return 2 * matrices + (scores_and_mix if attention == "full" else scores_and_mix // 2)


def training_flops_per_token(
    config: ModelConfig,
    seq_len: int,
    attention: AttentionCount = "full",
    recompute: bool = False,
) -> int:
    """FLOPs of one token's forward and backward pass: 3 x forward.

    With `recompute` the blocks run forward once more: what the hardware does (HFU), where MFU
    counts what the model needs.
    """
    forward = forward_flops_per_token(config, seq_len, attention)
    again = forward - 2 * config.vocab_size * config.d_model if recompute else 0
    return 3 * forward + again


class SavedBytes(NamedTuple):
    """Bytes that one token's forward pass keeps for the backward pass."""

    residual: int
    """On the residual stream: inputs of norms, dropout masks."""
    inner: int
    """In attention, MLP, head and loss."""


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, by where they are kept."""

    blocks: int
    """All transformer blocks, in bytes (with recomputation: their inputs and one run of blocks)."""
    ends: int
    """Embedding, final norm, head and loss, in bytes."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.blocks + self.ends


def activation_bytes(
    config: ModelConfig,
    micro_batch: int,
    seq_len: int,
    element_bytes: int,
    n_segments: int = 0,
    fused_loss: bool = False,
) -> Activations:
    """Bytes kept by one micro-batch (Korthikanti et al. 2022, section 4).

    `element_bytes`: 4 for fp32, 2 for bf16 and fp16. `n_segments` > 0: activation checkpointing
    with that many runs of blocks, at its peak, when one run has been recomputed. `fused_loss`:
    head and cross entropy in one.
    """
    tokens = micro_batch * seq_len
    per_block = tokens * sum(block_saved_bytes(config, element_bytes, seq_len))
    if n_segments:
        streams = n_segments * tokens * config.d_model * element_bytes  # between the runs
        blocks = streams + (config.n_layer // n_segments) * per_block
    else:
        blocks = config.n_layer * per_block
    ends = sum(embedding_saved_bytes(config)) + sum(
        head_saved_bytes(config, element_bytes, fused_loss)
    )
    once = head_gradient_bytes(config) if fused_loss else 0
    return Activations(blocks=blocks, ends=tokens * ends + once)


def embedding_saved_bytes(config: ModelConfig) -> SavedBytes:
    """What autograd keeps of the embedding for one token; ids are int64."""
    return SavedBytes(residual=config.d_model if config.dropout > 0 else 0, inner=8)


def head_saved_bytes(
    config: ModelConfig, element_bytes: int, fused_loss: bool = False
) -> SavedBytes:
    """What autograd keeps of final norm, head and loss for one token.

    With `fused_loss` no logits, and `head_gradient_bytes` for all tokens together.
    """
    stream = config.d_model * element_bytes
    final_norm = stream + _norm_statistics(config) if config.norm_place == "pre" else 0
    if fused_loss:
        return SavedBytes(residual=final_norm, inner=stream)  # the gradient of the head's input
    # the head's input; cross entropy's float32 log-probabilities and int64 target
    return SavedBytes(residual=final_norm, inner=stream + 4 * config.vocab_size + 8)


def head_gradient_bytes(config: ModelConfig) -> int:
    """Bytes of the gradient of the head's weight, float32: the fused loss has it from the forward
    pass on.
    """
    return 4 * config.vocab_size * config.d_model


def selective_saved_bytes(config: ModelConfig, element_bytes: int) -> int:
    """Bytes of one block for one token that "cheap" recomputation keeps beside the block's input:
    what its projections and fused attention gave.
    """
    shapes = Shapes.of(config)
    projections = shapes.d_qkv + 2 * config.d_model + _mlp_in(config) * shapes.d_ff
    kept = projections * element_bytes
    if fused_attention(config):
        kept += shapes.n_head * (shapes.d_head * element_bytes + 4)
    return kept


def block_saved_bytes(config: ModelConfig, element_bytes: int, n_keys: int) -> SavedBytes:
    """What autograd keeps of one block for one token, which attends to `n_keys` at most."""
    norms = 2 * (config.d_model * element_bytes + _norm_statistics(config))  # their inputs
    # each dropout keeps a mask of one byte per element
    masks = 2 * config.d_model if config.dropout > 0 else 0
    # the input of up, and the hidden layer: relu's output is all that its own backward needs;
    # gelu and relu2 keep input and output; swiglu gate, up, silu(gate) and their product
    copies = {"relu": 1, "gelu": 2, "relu2": 2, "swiglu": 4}[config.activation]
    mlp = (config.d_model + copies * Shapes.of(config).d_ff) * element_bytes
    return SavedBytes(norms + masks, _attention_kept(config, element_bytes, n_keys) + mlp)


def _attention_kept(config: ModelConfig, element_bytes: int, n_keys: int) -> int:
    shapes = Shapes.of(config)
    q_width, qk_heads = shapes.n_head * shapes.d_head, shapes.n_head + shapes.n_kv_head
    kept = (config.d_model + q_width) * element_bytes  # the inputs of qkv and out
    if config.qk_norm or config.position == "rotary":
        kept += qk_heads * shapes.d_head * element_bytes  # q and k a second time
    if config.qk_norm:
        kept += 4 * qk_heads  # float32 1/rms
    if fused_attention(config):
        # q, k, v; the log-sum-exp of each head's scores
        return kept + shapes.d_qkv * element_bytes + 4 * shapes.n_head
    # k and v once for each query head; the softmax, float32
    kept += 3 * q_width * element_bytes + 4 * shapes.n_head * n_keys
    if config.dropout > 0 or element_bytes < 4:
        kept += shapes.n_head * n_keys * element_bytes  # what the values are mixed by
    return kept + (shapes.n_head * n_keys if config.dropout > 0 else 0)


def fused_attention(config: ModelConfig) -> bool:
    """Whether training uses the kernel that never holds the scores (see `sdpa_attention`)."""
    return config.attention == "sdpa" and config.dropout == 0


def _norm_statistics(config: ModelConfig) -> int:
    """Bytes of a norm's float32 statistics for one token: 1/std, and LayerNorm's mean."""
    return 8 if config.norm == "layernorm" else 4
