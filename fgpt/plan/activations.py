"""Bytes of activations on one rank: the formulas of `fgpt.model.count`, for a part of the model."""

from __future__ import annotations

from collections.abc import Sequence

from fgpt.config.resolve import Resolved
from fgpt.config.speed import fuses_loss
from fgpt.model.count import (
    SavedBytes,
    block_saved_bytes,
    embedding_saved_bytes,
    fused_attention,
    head_gradient_bytes,
    head_saved_bytes,
    selective_saved_bytes,
)
from fgpt.parallel.pipeline.partition import is_pipe_partitioned
from fgpt.parallel.tensor.sharding import local_config


class Activations:
    """What a tensor- and context-parallel rank keeps of its micro-batches. Layers are names."""

    def __init__(self, resolved: Resolved):
        run, batch = resolved.run, resolved.batch
        self.batch = batch
        self.local = local_config(run.model, batch.tp)
        self.seq_len = resolved.seq_len
        self.element = resolved.element_bytes
        """Bytes."""
        self.tokens = batch.micro * resolved.seq_len // batch.cp
        """Of a micro-batch on this rank."""
        self.sequence = run.parallel.sequence
        self.in_parts = is_pipe_partitioned(resolved)
        self.stream_tokens = self.tokens // (batch.tp if self.sequence else 1)
        """Of them on its residual stream."""
        self.stream = self.stream_tokens * run.model.d_model * self.element
        """Bytes of the residual stream between two layers."""
        section = resolved.deepspeed.get("activation_checkpointing")
        n_layer = run.model.n_layer
        runs = (section or {}).get("number_checkpoints") or n_layer
        self.run_length = 0 if section is None else n_layer // runs
        """Blocks that are recomputed together; 0: none are."""
        cheap = section is not None and run.speed.recompute == "cheap"
        self.products = (
            self.tokens * selective_saved_bytes(self.local, self.element) if cheap else 0
        )
        """Bytes kept of each of these blocks nevertheless."""
        self.fused_loss = fuses_loss(run, resolved.precision)
        self.checkpoint = self.stream
        """Bytes kept on the device of such a run."""
        if section and section.get("partition_activations"):
            self.checkpoint //= batch.tp
        if section and section.get("cpu_checkpointing") and resolved.device != "cpu":
            self.checkpoint = 0

    def stage(self, stage: int, layers: Sequence[str], in_flight: int) -> int:
        """Bytes on a rank of this stage with these layers, when `in_flight` micro-batches have been
        forward and not backward: autograd's, and the pipeline's buffers.
        """
        kept = in_flight * self.kept(layers) + self.recomputed(layers)
        return kept + self._buffers(stage, in_flight)

    def kept(self, layers: Sequence[str]) -> int:
        """Bytes that autograd keeps of these layers for one micro-batch."""
        n_blocks = _n_blocks(layers)
        if self.run_length:
            kept = -(-n_blocks // self.run_length) * self.checkpoint + n_blocks * self.products
        else:
            kept = n_blocks * self._bytes(self._block())
        if "embedding" in layers:
            kept += self._bytes(embedding_saved_bytes(self.local))
        if "head" in layers:
            kept += self._bytes(head_saved_bytes(self.local, self.element, self.fused_loss))
            kept += head_gradient_bytes(self.local) if self.fused_loss else 0
        return kept

    def recomputed(self, layers: Sequence[str]) -> int:
        """Bytes of the run of blocks that is being recomputed; 0 without recomputation.

        What was kept of them (`products`) takes its place there, or goes.
        """
        block = max(self._bytes(self._block()) - self.products, 0)
        return min(self.run_length, _n_blocks(layers)) * block

    def _block(self) -> SavedBytes:
        kept = block_saved_bytes(self.local, self.element, n_keys=self.seq_len)
        if self.batch.cp > 1 and fused_attention(self.local):
            # the kernel's output beside what it is when its heads are traded back for tokens
            assert self.local.d_head is not None  # resolved
            output = self.local.n_head * self.local.d_head * self.element
            kept = kept._replace(inner=kept.inner + output)
        return kept

    def _bytes(self, kept: SavedBytes) -> int:
        return self.tokens * kept.inner + self.stream_tokens * kept.residual

    def _buffers(self, stage: int, in_flight: int) -> int:
        """What DeepSpeed's pipeline engine holds: what each micro-batch came in as and went out as,
        a buffer to receive the next in, and one for its gradient.

        Where tensor ranks send a part each (`is_pipe_partitioned`), they share what they receive.
        Nobody takes the logits out of the last stage's two buffers.
        """
        if self.batch.pp == 1:
            return 0
        sent = self.stream // self.batch.tp if self.in_parts else self.stream
        received = 0 if stage == 0 else sent + (0 if self.in_parts else in_flight * self.stream)
        if stage < self.batch.pp - 1:
            return received + (in_flight + 1) * sent
        logits = self.tokens * self.local.vocab_size * self.element
        return received + min(2, self.batch.accumulation) * logits


def _n_blocks(layers: Sequence[str]) -> int:
    return sum(layer.startswith("blocks.") for layer in layers)
