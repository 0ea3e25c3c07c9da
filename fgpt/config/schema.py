"""The run file as a tree of frozen dataclasses: what to train, on what, for how long.

Everything else (batch sizes, precision, optimizer, learning rate, ZeRO, clipping, activation
checkpointing, monitors) is said in the DeepSpeed JSON and nowhere else. Under each field: one
sentence with its unit. `None` means "derived"; `fgpt.config.resolve` fills it in and records how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Position = Literal["learned", "sinusoidal", "rotary", "none"]
NormKind = Literal["layernorm", "rmsnorm"]
NormPlace = Literal["pre", "post"]
Activation = Literal["gelu", "relu", "swiglu", "relu2"]
AttentionKernel = Literal["sdpa", "reference"]
EngineKind = Literal["deepspeed", "plain"]
Packing = Literal["stream", "best_fit"]
Compile = Literal["auto", "off", "blocks"]
Recomputed = Literal["all", "cheap"]
LossKind = Literal["auto", "plain", "fused"]
Matmul = Literal["auto", "torch", "fp8"]


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and choices of the GPT. Presets: `fgpt.config.presets`."""

    preset: str = "tiny"
    """Name of the preset the other values start from."""
    vocab_size: int = 4096
    """Rows of the token embedding; at least the tokenizer's vocabulary."""
    max_seq_len: int = 256
    """Longest sequence, in tokens (rows of a learned position table)."""
    n_layer: int = 4
    """Number of transformer blocks."""
    d_model: int = 256
    """Width of the residual stream, in elements."""
    n_head: int = 4
    """Number of query heads."""
    d_head: int | None = None
    """Width of one head, in elements; default d_model / n_head."""
    n_kv_head: int | None = None
    """Number of key/value heads (grouped-query attention); default n_head."""
    d_ff: int | None = None
    """Hidden width of the MLP, in elements; default 4 d_model (SwiGLU: 8/3, rounded up to 64)."""
    position: Position = "learned"
    """How positions enter: a learned or sinusoidal table, rotary on q and k, or not at all."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies (no unit)."""
    norm: NormKind = "layernorm"
    """Kind of normalisation."""
    norm_place: NormPlace = "pre"
    """Before each sublayer (pre) or after its residual sum (post)."""
    norm_eps: float = 1e-5
    """Added to the variance under the root (no unit)."""
    activation: Activation = "gelu"
    """MLP non-linearity; gelu is GPT-2's tanh form, relu2 is squared ReLU."""
    qk_norm: bool = False
    """Normalise each query and key head (RMS) before the scores."""
    tied_head: bool = True
    """The output head shares the token embedding's weight."""
    bias: bool = True
    """Linear layers and LayerNorms have a bias."""
    dropout: float = 0.0
    """Probability of dropping, on embeddings, attention weights and both residual branches."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    attention: AttentionKernel = "sdpa"
    """Torch's fused scaled-dot-product attention, or the written-out reference."""


@dataclass(frozen=True)
class DataConfig:
    """Which prepared data sets, and how they are cut into samples."""

    path: str = "data/prepared/python-stdlib"
    """Directory that `fgpt prepare` wrote (shards, tokenizer, data card), or several with weights,
    DIR:0.7,DIR:0.3 (in a run file also [{"path": DIR, "weight": 0.7}, ...])."""
    recipe: str = "data/recipes/python-stdlib.json"
    """Recipe from which rank 0 prepares `path` when it does not exist yet."""
    seq_len: int | None = None
    """Tokens per sample; default model.max_seq_len."""
    seed: int = 1234
    """Seed of the sample order (no unit)."""
    packing: Packing = "stream"
    """Samples are windows of the documents end to end (stream), or whole documents, packed so that
    few are cut (best_fit)."""
    document_mask: bool = False
    """Tokens attend to tokens of their own document only."""
    reset_positions: bool = False
    """Positions count from the beginning of a document's part in the sample, not of the sample."""
    prefetch: int = 2
    """Steps that are read ahead, beside training; 0: none."""


@dataclass(frozen=True)
class ParallelConfig:
    """The grid: world = tp x pp x cp x dp."""

    tp: int = 1
    """Tensor-parallel ranks: each holds a part of every matrix."""
    pp: int = 1
    """Pipeline stages: each holds some of the blocks."""
    cp: int = 1
    """Context-parallel ranks: each holds a part of every sequence, and trades it for heads where
    tokens attend to each other (DeepSpeed-Ulysses)."""
    sequence: bool = False
    """Sequence parallelism: between the split matrices, the tensor-parallel ranks share norms,
    dropout and the residual stream out by tokens instead of repeating them."""
    partition: str = "parameters"
    """Which blocks a pipeline stage gets: parameters (as many on each), uniform (as many layers),
    type:NAME (as many layers whose class has this in its name), or each stage's number of blocks,
    3,2 (in a run file also [3, 2])."""


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to print."""

    steps: int = 400
    """Optimizer steps in all, counted from the start of the run (not from a resume)."""
    seed: int = 1234
    """Seed of the initial weights and of dropout (no unit)."""
    engine: EngineKind = "deepspeed"
    """deepspeed, or plain: one process without DeepSpeed, the oracle of the tests."""
    log_every: int = 10
    """Steps between two console lines."""
    max_skipped: int = 5
    """Consecutive steps skipped for non-finite gradients before the run stops; fp16's
    first ones, which lower its loss scale, do not count."""
    deterministic: bool = False
    """Ask torch for deterministic kernels where it has them (slower; a CPU's are anyway)."""


@dataclass(frozen=True)
class SpeedConfig:
    """How a step is computed; a resume may change it. The defaults give the same numbers as the
    slowest way, up to rounding, and are the fastest of those that do."""

    compile: Compile = "auto"
    """torch.compile of the blocks, one graph for all of them (blocks), none (off), or auto: on a
    GPU, without dropout, documents, tp, cp, ZeRO-3 and cheap recomputation."""
    cuda_graphs: bool = False
    """Replay the compiled blocks as CUDA graphs."""
    recompute: Recomputed = "all"
    """Where the JSON has activation_checkpointing: recompute all of a block, or only what is cheap,
    and keep matrix products and attention."""
    loss: LossKind = "auto"
    """Head and cross entropy one after the other (plain), in one, which never holds all logits
    (fused), or auto: fused without tp and pp."""
    matmul: Matmul = "auto"
    """Who multiplies matrices: torch, or auto: on a CPU in float32 oneDNN where MKL is slow
    (AVX-512, not Intel). fp8: the blocks' projections in 8 bits, in bf16 training; not the same
    numbers. It is for GPUs of compute capability 8.9 (Ada, Hopper) or more, and slow on a CPU."""
    keep_memory: bool = True
    """On a CPU with glibc: blocks of up to 64 MiB stay with the process when they are freed, for
    the next tensor."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation split."""

    every: int = 100
    """Steps between two evaluations; 0: only at the end."""
    batches: int = 8
    """Global batches per evaluation; always the same samples."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, written to <run_dir>/checkpoints."""

    every: int = 100
    """Steps between two checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest complete checkpoints kept; at least 2, the newest may be the damaged one."""


@dataclass(frozen=True)
class SampleConfig:
    """The text generated at the end of a run."""

    prompt: str = "    def __init__(self, "
    """Text to continue."""
    tokens: int = 120
    """Tokens to generate; 0: none."""
    temperature: float = 0.8
    """Softmax temperature; 0: greedy."""
    top_k: int = 40
    """Draw from the k most likely tokens; 0: all."""


@dataclass(frozen=True)
class RunConfig:
    """One run: the root of the tree. Sections of a run file are these fields."""

    run_dir: str | None = None
    """Directory of all that the run writes; default runs/<model preset>-<DeepSpeed JSON's name>."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The GPT."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The grid of ranks."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, seed, logging."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """How it is computed."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """The final sample."""
