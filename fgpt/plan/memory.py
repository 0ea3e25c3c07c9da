"""Predicted memory of the ranks of each pipeline stage, from shapes alone.

Counted are the tensors that DeepSpeed 0.19.8 and autograd keep: weights, gradients at their peak
(in the last backward pass before a step), optimizer states, and activations (by the formulas of
`fgpt.model.count`). Buckets, temporary tensors and the allocator's reserve come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fgpt.config.deepspeed.settings import OPTIMIZER_OFFLOAD, PARAM_OFFLOAD, DeepSpeedSettings
from fgpt.config.resolve import Resolved
from fgpt.config.speed import fuses_loss
from fgpt.model.count import (
    SavedBytes,
    embedding_saved_bytes,
    head_gradient_bytes,
    head_saved_bytes,
    selective_saved_bytes,
)
from fgpt.parallel.pipeline.partition import layer_names, layer_params, stage_bounds
from fgpt.parallel.tensor.local import local_config
from fgpt.parallel.tensor.sharding import full_shapes
from fgpt.plan.activation_memory import own_block_saved_bytes, pipeline_buffers
from fgpt.plan.state_memory import Place, StateBytes, divided_states


@dataclass(frozen=True)
class StageRow:
    """One rank of a pipeline stage; all ranks of a stage need the same memory."""

    stage: int
    first: str
    """Name of the first layer."""
    last: str
    """Name of the last layer."""
    params: int
    """Parameters of the rank, before ZeRO shards them."""
    weights: int
    """Bytes."""
    gradients: int
    """Bytes, at their peak."""
    optimizer: int
    """Bytes of the optimizer's states and of its fp32 copy of the weights."""
    in_flight: int
    """Most micro-batches between their forward and their backward pass."""
    activations: int
    """Bytes, of all micro-batches in flight."""
    host: int
    """Bytes offloaded to host memory."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_table(resolved: Resolved) -> list[StageRow]:
    """Return a row for each pipeline stage of a DeepSpeed run; one row without a pipeline."""
    run, batch = resolved.run, resolved.batch
    bounds = stage_bounds(run.model, batch.pp, run.parallel.partition)
    names = layer_names(run.model)
    activations = Activations(resolved)
    rows = []
    for stage, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        layers, in_flight = names[begin:end], min(batch.accumulation, batch.pp - stage)
        params, states = rank_params(resolved, layers), state_bytes(resolved, layers)
        rows.append(
            StageRow(
                stage=stage,
                first=layers[0],
                last=layers[-1],
                params=params,
                weights=int(params * states.weights),
                gradients=int(params * states.gradients),
                optimizer=int(params * states.optimizer),
                in_flight=in_flight,
                activations=activations.stage(stage, layers, in_flight),
                host=int(params * states.host),
            )
        )
    return rows


def rank_params(resolved: Resolved, layers: Sequence[str]) -> int:
    """Parameters of these layers on one tensor-parallel rank.

    A tied head adds its matrix only where the embedding is on another stage.
    """
    local = local_config(resolved.run.model, resolved.batch.tp)
    params = dict(zip(layer_names(local), layer_params(local), strict=True))
    shared = params["head"] if local.tied_head and {"embedding", "head"} <= set(layers) else 0
    return sum(params[layer] for layer in layers) - shared


def state_bytes(resolved: Resolved, layers: Sequence[str] | None = None) -> StateBytes:
    """Bytes per parameter of these layers, or of all, without activations, on the device and on the
    host.
    """
    layers = layer_names(resolved.run.model) if layers is None else layers
    replicas = resolved.batch.dp * resolved.batch.cp
    settings = resolved.engine_settings
    return divided_states(
        resolved.element_bytes,
        _gradient_bytes(settings),
        _optimizer_bytes(resolved, layers),
        zero_stage=settings.zero_stage,
        shards=replicas,
        optimizer_place=_place(settings, OPTIMIZER_OFFLOAD, settings.offloads_optimizer),
        params_place=_place(settings, PARAM_OFFLOAD, settings.offloads_params),
    )


def _place(settings: DeepSpeedSettings, section: str, offloads: bool) -> Place:
    if not offloads:
        return "device"
    return "disk" if section in settings.nvme_paths else "host"


def _gradient_bytes(settings: DeepSpeedSettings) -> int:
    if not settings.accumulates_fp32:
        return 2
    return 6 if settings.has_separate_grad_sums else 4


def _optimizer_bytes(resolved: Resolved, layers: Sequence[str]) -> Fraction:
    """Bytes per parameter of the states and the copy of the weights; ZeRO copies fp32 too."""
    settings, optimizer = resolved.engine_settings, resolved.settings.optimizer
    assert optimizer is not None  # resolved
    params, prefixes = resolved.settings.optimizer_params, tuple(f"{layer}." for layer in layers)
    n_states = Fraction(len(optimizer.state_names(params)))
    if optimizer.matrix_states:  # the mean over the parameters
        shapes = full_shapes(resolved.run.model)
        own = {name: shape for name, shape in shapes.items() if name.startswith(prefixes)}
        values = sum(optimizer.n_states(n, len(s), params) * s.numel() for n, s in own.items())
        n_states = Fraction(values, sum(shape.numel() for shape in own.values()))
    average = 4 if resolved.run.train.ema is not None else 0
    has_copy = settings.zero_stage > 0 or settings.precision != "fp32"
    copy_size = 2 if settings.get("bf16.bf16_master_weights_and_grads") else 4
    state_size = 2 if settings.get("bf16.bf16_optimizer_states") else optimizer.state_bytes
    return has_copy * copy_size + n_states * state_size + average


class Activations:
    """Activation memory of a tensor- and context-parallel rank. Layers are given by name."""

    def __init__(self, resolved: Resolved):
        run, batch = resolved.run, resolved.batch
        self.batch = batch
        self.local = local_config(run.model, batch.tp)
        self.seq_len = resolved.seq_len
        self.element = resolved.element_bytes
        """Bytes."""
        self.tokens = batch.micro * resolved.seq_len // batch.cp
        """Tokens of a micro-batch on this rank."""
        self.pipe_partitioned = resolved.is_pipe_partitioned
        self.stream_tokens = self.tokens // (batch.tp if run.parallel.sequence else 1)
        """Tokens of a micro-batch in this rank's residual stream."""
        self.stream = self.stream_tokens * run.model.d_model * self.element
        """Bytes of the residual stream between two layers."""
        section = resolved.settings.checkpointing
        n_layer = run.model.n_layer
        n_segments = (section or {}).get("number_checkpoints") or n_layer
        self.segment_blocks = 0 if section is None else n_layer // n_segments
        """Blocks that are recomputed together; 0 without recomputation."""
        cheap = section is not None and run.speed.recompute == "cheap"
        self.kept_products = (
            self.tokens * selective_saved_bytes(self.local, self.element) if cheap else 0
        )
        """Bytes that a recomputed block stores."""
        self.fused_loss = fuses_loss(run, resolved.precision)
        self.segment_input = self.stream
        """Bytes that a recomputed segment keeps on the device."""
        if section and section.get("partition_activations"):
            self.segment_input //= batch.tp
        if section and section.get("cpu_checkpointing") and resolved.device != "cpu":
            self.segment_input = 0

    def stage(self, stage: int, layers: Sequence[str], in_flight: int) -> int:
        """Peak bytes of a stage with these layers and `in_flight` micro-batches: autograd's tensors
        and the pipeline's buffers.
        """
        kept = in_flight * self.kept(layers) + self.recomputed(layers)
        return kept + self._buffers(stage, in_flight)

    def kept(self, layers: Sequence[str]) -> int:
        """Bytes that autograd keeps of these layers for one micro-batch."""
        n_blocks = _n_blocks(layers)
        if self.segment_blocks:
            n_segments = -(-n_blocks // self.segment_blocks)
            kept = n_segments * self.segment_input + n_blocks * self.kept_products
        else:
            kept = n_blocks * self._bytes(self._block())
        if "embedding" in layers:
            kept += self._bytes(embedding_saved_bytes(self.local))
        if "head" in layers:
            kept += self._bytes(head_saved_bytes(self.local, self.element, self.fused_loss))
            kept += head_gradient_bytes(self.local) if self.fused_loss else 0
        return kept

    def recomputed(self, layers: Sequence[str]) -> int:
        """Bytes of the segment that is being recomputed, beyond `kept_products`."""
        block = max(self._bytes(self._block()) - self.kept_products, 0)
        return min(self.segment_blocks, _n_blocks(layers)) * block

    def _block(self) -> SavedBytes:
        return own_block_saved_bytes(self.local, self.element, self.seq_len, self.batch.cp)

    def _bytes(self, saved: SavedBytes) -> int:
        return self.tokens * saved.inner + self.stream_tokens * saved.residual

    def _buffers(self, stage: int, in_flight: int) -> int:
        if self.batch.pp == 1:
            return 0
        sent = self.stream // self.batch.tp if self.pipe_partitioned else self.stream
        logits = self.tokens * self.local.vocab_size * self.element
        return pipeline_buffers(
            stage == 0,
            self.stream,
            sent,
            logits if stage == self.batch.pp - 1 else None,
            in_flight,
            self.batch.accumulation,
        )


def _n_blocks(layers: Sequence[str]) -> int:
    return sum(layer.startswith("blocks.") for layer in layers)


def render_stages(rows: Sequence[StageRow], console: Console) -> None:
    """Print the table."""
    table = Table(title="memory of a rank", title_justify="left", box=None, pad_edge=False)
    names = ["parameters", "weights", "gradients", "optimizer", "activations", "in all"]
    names += ["on the host"] if any(row.host for row in rows) else []
    for column in ("stage", "layers"):
        table.add_column(column, no_wrap=True)
    for column in names:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        sizes = [row.weights, row.gradients, row.optimizer, row.activations, row.total, row.host]
        layers = f"{row.first} .. {row.last}"
        cells = [f"{row.params:,}", *(f"{size / 2**20:,.1f}" for size in sizes)][: len(names)]
        table.add_row(*(Text(cell) for cell in (str(row.stage), layers, *cells)))
    # a launcher's output is not a terminal and has no width
    wide = Console(file=console.file, width=max(console.width, 110), quiet=console.quiet)
    wide.print(table)
    console.print(Text("in MiB, without buckets and temporary tensors"))
