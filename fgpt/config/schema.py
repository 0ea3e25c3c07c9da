"""The run file as a tree of frozen dataclasses: what to train, on what, for how long.

Everything else (batch sizes, precision, optimizer, learning rate, ZeRO, clipping, activation
checkpointing, monitors) is set in the DeepSpeed JSON only. Below each field is a sentence with its
unit. `fgpt.config.derive` replaces None and records how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

InitResidual = Literal["scaled", "zero"]
Position = Literal["learned", "sinusoidal", "rotary", "none"]
NormKind = Literal["layernorm", "rmsnorm"]
NormPlace = Literal["pre", "post"]
Activation = Literal["gelu", "relu", "swiglu", "relu2"]
AttentionKernel = Literal["sdpa", "reference"]
EngineKind = Literal["deepspeed", "plain"]
Packing = Literal["stream", "best_fit"]
Compile = Literal["auto", "off", "blocks"]
Recompute = Literal["all", "cheap"]
LossKind = Literal["auto", "plain", "fused"]
Matmul = Literal["auto", "torch", "fp8"]
ScheduleKind = Literal["deepspeed", "wsd", "cosine", "linear", "constant"]
DecayShape = Literal["linear", "cosine", "1-sqrt"]
WeightDecayKind = Literal["constant", "with_lr", "linear"]


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and variants of the GPT. Presets: `fgpt.config.presets`."""

    preset: str = "tiny"
    """Name of the preset that provides the other values."""
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
    """Position encoding: a learned or sinusoidal table, rotary on q and k, or none."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies (no unit)."""
    norm: NormKind = "layernorm"
    """Kind of normalization."""
    norm_place: NormPlace = "pre"
    """Normalize before each sublayer (pre) or after its residual sum (post)."""
    norm_eps: float = 1e-5
    """Added to the variance under the root (no unit)."""
    activation: Activation = "gelu"
    """MLP activation; gelu is GPT-2's tanh approximation, relu2 is squared ReLU."""
    qk_norm: bool = False
    """Apply RMSNorm to each query and key head before attention."""
    window: int | None = None
    """Sliding window: a token attends to itself and the window - 1 tokens before it (Mistral);
    default all earlier tokens."""
    window_pattern: int | None = None
    """With a window, every so many blocks one attends to all earlier tokens: 2 the second, fourth,
    ... block (Gemma 2, gpt-oss), 6 the sixth (Gemma 3); default none."""
    embedding_scale: float = 1.0
    """Factor of the token embeddings, before positions are added (Vaswani et al. 2017, Gemma: the
    root of d_model; no unit)."""
    tied_head: bool = True
    """The output head shares the token embedding's weight."""
    logit_softcap: float | None = None
    """Cap the logits smoothly: cap x tanh(logits / cap) (Gemma 2: 30); default no cap."""
    z_loss: float = 0.0
    """Training also minimizes this coefficient times the mean of log(sum(exp(logits)))^2, which
    keeps the logits small (Chowdhery et al. 2022: 1e-4). Losses that are printed leave it out."""
    bias: bool = True
    """Linear layers and LayerNorms have a bias."""
    dropout: float = 0.0
    """Dropout probability on embeddings, attention weights and both residual branches. Above 0 it
    turns fused attention and compiled blocks off."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    init_residual: InitResidual = "scaled"
    """Initial weights that write into the residual stream (attention.out, mlp.down): init_std
    divided by the root of 2 n_layer (scaled), or 0, so that each block begins as the identity
    (zero)."""
    mup_base: int | None = None
    """muP: d_model of a narrower model, whose learning rates then suit this one (Yang et al. 2022);
    default none. In a run file also "mup": {"base": 128}. fgpt/model/README.md says what it
    changes."""
    mup_base_d_head: int | None = None
    """Width of one head of the model with d_model mup_base, in elements; default d_head: wider
    models have more heads."""
    attention: AttentionKernel = "sdpa"
    """Torch's fused scaled-dot-product attention (sdpa), or a slow reference of plain products."""


def block_window(config: ModelConfig, block: int) -> int | None:
    """Return the sliding window of this block, in tokens; None: it attends to all earlier ones."""
    pattern = config.window_pattern
    return None if pattern is not None and (block + 1) % pattern == 0 else config.window


def width_ratio(config: ModelConfig) -> float:
    """Return how many times as wide as its muP base the model is; 1 without muP."""
    return 1.0 if config.mup_base is None else config.d_model / config.mup_base


def query_scale(config: ModelConfig) -> float:
    """Return muP's factor of the queries, beside attention's own 1 / sqrt(d_head)."""
    if config.mup_base_d_head is None:
        return 1.0
    return math.sqrt(config.mup_base_d_head / Shapes.of(config).d_head)


class SavedModel(NamedTuple):
    """The model of saved weights."""

    config: ModelConfig
    """The model."""
    path: str
    """The weights."""
    data: str | None = None
    """`data.path` of the run that trained them; None: unknown."""


@dataclass(frozen=True)
class Shapes:
    """The widths of a model, with the defaults of `ModelConfig` filled in."""

    n_head: int
    """Query heads."""
    n_kv_head: int
    """Key/value heads; each serves n_head / n_kv_head query heads."""
    d_head: int
    """Width of one head, in elements."""
    d_ff: int
    """Hidden width of the MLP, in elements."""

    @property
    def d_qkv(self) -> int:
        """Rows of the fused q, k, v projection."""
        return (self.n_head + 2 * self.n_kv_head) * self.d_head

    @classmethod
    def of(cls, config: ModelConfig) -> Shapes:
        """Derive the widths that `config` leaves None."""
        swiglu = -(-8 * config.d_model // 3 // 64) * 64  # 8/3 d_model, rounded up to 64
        return cls(
            n_head=config.n_head,
            n_kv_head=config.n_kv_head or config.n_head,
            d_head=config.d_head or config.d_model // config.n_head,
            d_ff=config.d_ff or (swiglu if config.activation == "swiglu" else 4 * config.d_model),
        )


@dataclass(frozen=True)
class DataConfig:
    """Prepared data sets, and how samples are taken from them."""

    path: str = "data/prepared/python-stdlib"
    """Directory that `fgpt prepare` wrote (shards, tokenizer, data card), or several with weights,
    DIR:0.7,DIR:0.3 (in a run file also [{"path": DIR, "weight": 0.7}, ...])."""
    stages: str | None = None
    """Other data from so many tokens of the run on: TOKENS=DATA, separated by semicolons,
    8e9=DIR:0.7,DIR:0.3;9e9=DIR (in a run file also [{"tokens": 8e9, "path": ...}, ...]). Before the
    first one, and for every evaluation, the data is `path`."""
    skip_samples: str | None = None
    """Sample numbers that training leaves out, FIRST-LAST of each range, 1000-1031,2000-2031 (in a
    run file also [[1000, 1031], [2000, 2031]]): the steps take the next samples instead."""
    recipe: str = "data/recipes/python-stdlib.json"
    """Recipe from which rank 0 prepares `path` when it does not exist yet."""
    seq_len: int | None = None
    """Tokens per sample; default model.max_seq_len."""
    seed: int = 1234
    """Seed of the sample order (no unit)."""
    packing: Packing = "stream"
    """Samples are consecutive windows of the concatenated documents (stream), or whole documents
    packed so that few are cut (best_fit)."""
    document_mask: bool = False
    """Tokens attend only to tokens of the same document."""
    reset_positions: bool = False
    """Positions restart at 0 at each document's first token in the sample."""
    prefetch: int = 2
    """Steps whose samples a thread reads ahead; 0: none."""


@dataclass(frozen=True)
class ParallelConfig:
    """The grid: world = tp x pp x cp x dp."""

    tp: int = 1
    """Tensor-parallel ranks: each holds a shard of every matrix."""
    pp: int = 1
    """Pipeline stages: each holds some of the blocks."""
    cp: int = 1
    """Context-parallel ranks: each holds a shard of every sequence, and exchanges it for a shard of
    the heads during attention (DeepSpeed-Ulysses)."""
    sequence: bool = False
    """Sequence parallelism: tensor-parallel ranks divide norms, dropout and the residual stream by
    tokens instead of repeating them (Korthikanti et al. 2022)."""
    partition: str = "parameters"
    """How stages get their blocks: equally many parameters (parameters), equally many layers
    (uniform), equally many layers with NAME in their class name (type:NAME), or the number of
    blocks of each stage, 3,2 (in a run file also [3, 2])."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of training, seed, engine and log."""

    steps: int = 400
    """Total optimizer steps, including those before a resume."""
    tokens: float | None = None
    """Total training tokens instead of steps; rounded up to whole steps."""
    epochs: float | None = None
    """Passes over the training split instead of steps; rounded up to whole steps."""
    batch_ramp: str | None = None
    """The global batch grows over the first steps: STEP:BATCH,..., 0:64,100:128 (in a run file also
    [[0, 64], [100, 128]]), steps counted from 0, the last batch the DeepSpeed JSON's; micro-batches
    stay, their number per step grows."""
    seed: int = 1234
    """Seed of the initial weights and of dropout (no unit)."""
    init_from: str | None = None
    """Weights to start from: a run directory, a checkpoint, or a directory of Hugging Face. The
    model is theirs where nothing else is set; optimizer and step are new."""
    engine: EngineKind = "deepspeed"
    """deepspeed, or plain: one process without DeepSpeed, the tests' reference."""
    log_every: int = 10
    """Steps between two console lines."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the weights, which is evaluated beside
    them and saved with them, such as 0.999; default none."""
    max_skipped: int = 5
    """Consecutive steps skipped for non-finite gradients before the run stops; the first ones in
    fp16, which find the loss scale, do not count."""
    watchdog_s: float = 600.0
    """Seconds without progress after which the run ends, naming the rank that the others wait for;
    the first step, evaluations and saves have 6 times as long, steps at least 3 times as long as
    the longest so far; 0: never."""
    grace_s: float = 120.0
    """After SIGTERM or SIGINT, the seconds without progress after which a rank exits unsaved; 0:
    never."""
    max_loss_jump: float | None = None
    """Nats per token: a step whose loss exceeds the mean of the 20 losses before it by more than
    this ends the run, and no checkpoint has that step; 0 or by default: no such limit."""
    deterministic: bool = False
    """Use torch's deterministic kernels where they exist (slower; CPU kernels always are)."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate by the optimizer step, as a factor of each parameter group's own rate
    (optimizer.params.lr): a warm-up, a constant part, a decay (`fgpt.optim.run_schedule` has the
    formula); momentum and weight decay. Fields but `kind` are for the kinds other than deepspeed.
    """

    kind: ScheduleKind = "deepspeed"
    """What the DeepSpeed JSON's scheduler says (deepspeed); or warm-up, constant part and decay
    (wsd), a decay from the warm-up on (cosine, linear), or no decay (constant)."""
    warmup_steps: int | None = None
    """Steps of linear warm-up, the last one at the peak; default a twentieth of total_steps, within
    50 and 2,000, at most half of them."""
    decay_steps: int | None = None
    """Of wsd: steps of the decay, the last ones of total_steps; default a fifth of them."""
    decay_shape: DecayShape | None = None
    """Of wsd: the decay's shape, linear, cosine or 1-sqrt (Haegele et al. 2024); default 1-sqrt."""
    min_ratio: float | None = None
    """The rate that the decay ends at, as a fraction of the peak; default 0."""
    total_steps: int | None = None
    """Steps of the whole schedule; default train.steps."""
    momentum_warmup_steps: int = 0
    """Steps in which the momentum goes linearly from momentum_start to the optimizer's own: its
    `momentum`, or beta1 where no parameter group has one; 0: it stays its own."""
    momentum_start: float | None = None
    """The momentum of the first step, with momentum_warmup_steps; default 0.85."""
    weight_decay: WeightDecayKind = "constant"
    """The optimizer's weight decay at every step (constant), times the learning rate's factor
    (with_lr), or falling linearly to 0 at total_steps (linear)."""


@dataclass(frozen=True)
class SpeedConfig:
    """How a step is computed; a resume may change it. The defaults are the fastest choices that
    give the reference's numbers up to rounding."""

    compile: Compile = "auto"
    """torch.compile every block with one shared graph (blocks), nothing (off), or auto: blocks on a
    GPU without dropout, document_mask, tp, cp, ZeRO-3 and recompute cheap."""
    cuda_graphs: bool = False
    """Replay the compiled blocks as CUDA graphs."""
    recompute: Recompute = "all"
    """With activation_checkpointing in the JSON: recompute all of a block, or only cheap
    operations, keeping the results of matrix products and attention."""
    loss: LossKind = "auto"
    """Output head and cross entropy as two operations (plain), as one that never holds all logits
    (fused), or auto: fused without tp, pp and fp16."""
    matmul: Matmul = "auto"
    """Matrix products by torch, or auto: by oneDNN in float32 on CPUs where MKL is slow (AVX-512,
    not Intel), by torch elsewhere. fp8: the blocks' projections in 8 bits, in bf16 training, with
    other numbers; for GPUs of compute capability 8.9 (Ada, Hopper) or more, slow on a CPU."""
    keep_memory: bool = True
    """On a CPU with glibc, the process keeps freed memory of up to 64 MiB each for new tensors."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation split."""

    every: int = 100
    """Steps between two evaluations; 0: only at the end."""
    batches: int = 8
    """Global batches per evaluation; every evaluation has the same samples."""
    suites: str | None = None
    """Files of questions to answer at each evaluation, separated by commas
    (`fgpt.evaluation.questions`)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, written to <run_dir>/checkpoints."""

    every: int = 100
    """Steps between two checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest complete checkpoints to keep; at least 2, as the newest may be damaged."""
    keep_every: int = 0
    """Steps between two checkpoints that are kept forever, a multiple of `every`; 0: none."""
    async_: bool = True
    """Copy the state to host memory and write it while training goes on; false: training waits and
    no copy is held. (`async` in a run file.)"""
    best: bool = False
    """Also save after an evaluation with the lowest validation loss so far, and keep that one."""


@dataclass(frozen=True)
class SampleConfig:
    """The texts generated by a run."""

    prompt: str = "    def __init__(self, "
    """Text to continue."""
    every: int = 0
    """Steps between two texts, kept in samples.jsonl; 0: only at the end."""
    tokens: int = 120
    """Tokens to generate; 0: none."""
    temperature: float = 0.8
    """Softmax temperature; 0: greedy."""
    top_k: int = 40
    """Sample from the k most likely tokens; 0: all."""


@dataclass(frozen=True)
class RunConfig:
    """One run. A run file has these fields as its sections."""

    run_dir: str | None = None
    """Directory of the run's output; default runs/<model preset>-<DeepSpeed JSON's name>."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The GPT."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The grid of ranks."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, seed, logging."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate by the step."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """How a step is computed."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """The final sample."""
