"""Bytes of the tensors that the forward passes of a planned run keep for their backward passes.

`fgpt.model.count` has the formulas of FGPT's own blocks; here are those of Megatron-LM's
(Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
section 4), and what both need in a pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.model.count import (
    SavedBytes,
    block_saved_bytes,
    embedding_saved_bytes,
    fused_attention,
    head_gradient_bytes,
    head_saved_bytes,
    selective_saved_bytes,
)
from fgpt.plan.planned_run import PlannedRun
from fgpt.plan.shapes_of_rank import StageShapes, local_model


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block and one micro-batch on one rank, the mean over the blocks."""

    kept: float
    """From the forward to the backward pass."""
    recomputed: int
    """While the block is computed again, with its input, beyond the results of matrix products that
    were kept; 0 without recomputation."""


@dataclass(frozen=True)
class LossMemory:
    """Bytes of one micro-batch at the peak of the loss, on a rank with the head."""

    kept: int
    """What autograd keeps of final norm, head and loss."""
    temporary: int
    """Further tensors of vocabulary size that live at the same time."""


def megatron_block_saved_bytes(
    config: ModelConfig, element_bytes: int, n_keys: int, keeps_scores: bool = True
) -> SavedBytes:
    """Saved per token by one of Megatron-LM's blocks, of which `config` is a tensor rank's shard.

    With LayerNorm, GELU, dropout and unfused attention of n_head = a heads over s tokens these are
    34 h + 5 a s bytes in 16 bits. `keeps_scores` False: attention is recomputed.
    """
    shapes = Shapes.of(config)
    width = config.d_model * element_bytes
    masks = 2 * config.d_model if config.dropout > 0 else 0  # one byte per element
    # inputs of both norms and of qkv and up, which sequence parallelism gathers again
    residual = 4 * width + masks
    elements = shapes.d_qkv + shapes.n_head * shapes.d_head  # q, k, v and the input of out
    if config.position == "rotary":
        elements += (shapes.n_head + shapes.n_kv_head) * shapes.d_head  # q and k before it
    # MLP: what its activation function reads and writes
    elements += (3 if config.activation == "swiglu" else 2) * shapes.d_ff
    inner = elements * element_bytes
    if fused_attention(config):
        inner += 4 * shapes.n_head  # the log-sum-exp
    elif keeps_scores:
        per_score = element_bytes  # softmax
        per_score += 1 + element_bytes if config.dropout > 0 else 0  # mask, dropout's output
        inner += per_score * shapes.n_head * n_keys
    return SavedBytes(residual, inner)


def own_block_saved_bytes(
    local: ModelConfig, element_bytes: int, n_keys: int, cp: int
) -> SavedBytes:
    """Saved per token by one of FGPT's blocks on a tensor- and context-parallel rank."""
    saved = block_saved_bytes(local, element_bytes, n_keys)
    if cp > 1 and fused_attention(local) and local.dropout == 0:
        # torch's kernel keeps its output; autograd keeps that of the all-to-all
        shapes = Shapes.of(local)
        output = shapes.n_head * shapes.d_head * element_bytes
        saved = saved._replace(inner=saved.inner + output)
    return saved


def block_memory(run: PlannedRun) -> BlockMemory:
    """Return the memory of a block for one micro-batch."""
    local, element = local_model(run), run.element_bytes
    shape = (local, run.kernels == "megatron", element, run.seq_len, run.cp)
    whole = _bytes(run, _block_saved(*shape, keeps_scores=True))
    if run.recompute == "none":
        return BlockMemory(whole, 0)
    if run.recompute == "attention":
        kept = _bytes(run, _block_saved(*shape, keeps_scores=False))
        return BlockMemory(kept, whole - kept)
    kept = _stream_tokens(run) * local.d_model * element  # the block's input
    is_cheap = run.recompute == "cheap"
    products = run.micro_tokens * selective_saved_bytes(local, element) if is_cheap else 0
    kept += products
    share = run.recomputed_share
    return BlockMemory(share * kept + (1 - share) * whole, max(whole - products, 0))


def loss_memory(run: PlannedRun) -> LossMemory:
    """Return the memory of head and loss for one micro-batch."""
    local, element = local_model(run), run.element_bytes
    is_fused, logits = run.loss == "fused", run.micro_tokens * local.vocab_size
    kept = _bytes(run, head_saved_bytes(local, element, is_fused))
    if is_fused:
        return LossMemory(kept + head_gradient_bytes(local), 0)
    if run.loss == "in_place":  # the logits, and a copy that leaves out the last tokens' logits
        return LossMemory(kept - 4 * logits + 2 * element * logits, 0)
    if run.kernels == "megatron" and run.engine == "megatron":
        # softmax and its gradient are written over the fp32 copy of the logits
        return LossMemory(kept, logits * element)
    if run.kernels == "megatron":
        # the pipeline's buffers have the logits; the softmax becomes its gradient, then 16 bits
        return LossMemory(kept, logits * element)
    # logits, which DeepSpeed's pipeline keeps in its buffers, and the gradient of the kept
    # log-probabilities
    in_buffers = run.engine == "deepspeed" and run.pp > 1
    return LossMemory(kept, logits * (4 if in_buffers else element + 4))


def embedding_memory(run: PlannedRun) -> int:
    """Bytes that the embedding keeps for one micro-batch."""
    return _bytes(run, embedding_saved_bytes(local_model(run)))


def pipe_buffer_bytes(run: PlannedRun, shapes: StageShapes, in_flight: int) -> int:
    """Bytes of what a stage sent and received. DeepSpeed keeps each micro-batch's until its
    backward pass; Megatron-LM frees what it sent.
    """
    # Megatron-DeepSpeed is one pipeline stage without a pipeline, and its logits are fp32
    is_pipe = run.kernels == "megatron" and run.engine == "deepspeed"
    if run.pp == 1 and not is_pipe:
        return 0
    stream = _stream_tokens(run) * run.model.d_model * run.element_bytes
    if run.engine == "megatron":
        return 2 * stream
    logits = run.micro_tokens * shapes.local.vocab_size * (4 if is_pipe else run.element_bytes)
    return pipeline_buffers(
        shapes.has_embedding,
        stream,
        stream,
        None if not shapes.has_head else logits,
        in_flight,
        run.accumulation,
    )


def pipeline_buffers(
    is_first: bool, stream: int, sent: int, logits: int | None, in_flight: int, accumulation: int
) -> int:
    """Bytes of the buffers of DeepSpeed's pipeline engine: each micro-batch's input and output, a
    receive buffer, and one for its gradient.

    `stream`: bytes between two stages; `sent`: those that one rank sends, fewer with partitioned
    pipe communication, where ranks receive one part each. The last stage's two buffers keep the
    `logits`, None on other stages.
    """
    is_whole = sent == stream
    received = 0 if is_first else sent + (in_flight * stream if is_whole else 0)
    if logits is None:
        return received + (in_flight + 1) * sent
    return received + min(2, accumulation) * logits


def chunks_in_flight(run: PlannedRun, stage: int) -> int:
    """Return the most parts of the model (`interleave` on a stage) whose forward pass ran and whose
    backward pass did not.

    Interleaved 1F1B (Narayanan et al. 2021): a stage runs 2 (pp - stage - 1) + (v - 1) g forward
    passes before its first backward pass. Megatron-LM's groups have g = pp micro-batches, or the
    least number from pp on that leaves no rest of less than pp.
    """
    if run.interleave == 1:
        return min(run.accumulation, run.pp - stage)
    group = run.pp
    while 0 < run.accumulation % group < run.pp and group < run.accumulation:
        group += 1
    warm_up = 2 * (run.pp - stage - 1) + (run.interleave - 1) * group + 1
    return min(warm_up, run.accumulation * run.interleave)


@lru_cache(maxsize=4096)
def _block_saved(
    local: ModelConfig, is_megatron: bool, element: int, n_keys: int, cp: int, keeps_scores: bool
) -> SavedBytes:
    if is_megatron:
        return megatron_block_saved_bytes(local, element, n_keys, keeps_scores)
    is_without = not keeps_scores and not fused_attention(local)
    return own_block_saved_bytes(local, element, 0 if is_without else n_keys, cp)


def _stream_tokens(run: PlannedRun) -> int:
    """Tokens of a micro-batch in a rank's residual stream."""
    return run.micro_tokens // (run.tp if run.sequence else 1)


def _bytes(run: PlannedRun, saved: SavedBytes) -> int:
    return run.micro_tokens * saved.inner + _stream_tokens(run) * saved.residual
