"""Time of the kernels of one rank's block, embedding and head, from shapes.

A kernel takes the longer of two times: FLOPs / (peak x efficiency) and bytes / bandwidth. Times
are seconds, of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fgpt.config.schema import ModelConfig, Shapes, block_window
from fgpt.parallel.tensor.local import local_config
from fgpt.plan.cluster import Device
from fgpt.plan.efficiency import Efficiency
from fgpt.plan.planned_run import PlannedRun


@dataclass(frozen=True)
class KernelTime:
    """Seconds of kernels, by what they do, and how many kernels there are."""

    matrix: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    count: float = 0.0

    @property
    def seconds(self) -> float:
        return self.matrix + self.attention + self.memory

    def __add__(self, other: KernelTime) -> KernelTime:
        return KernelTime(
            self.matrix + other.matrix,
            self.attention + other.attention,
            self.memory + other.memory,
            self.count + other.count,
        )

    def times(self, factor: float) -> KernelTime:
        return KernelTime(
            self.matrix * factor, self.attention * factor, self.memory * factor, self.count * factor
        )


@dataclass(frozen=True)
class PassTimes:
    """Forward and backward pass of one layer."""

    forward: KernelTime
    backward: KernelTime

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds


def _local_model(model: ModelConfig, tp: int) -> ModelConfig:
    """Return the model of one tensor-parallel rank; key/value heads are repeated where there are
    fewer than ranks.
    """
    n_kv_head = max(Shapes.of(model).n_kv_head, tp)
    return local_config(replace(model, n_kv_head=n_kv_head), tp)


class Kernels:
    """Kernels of one rank of a run on a device."""

    def __init__(self, run: PlannedRun, device: Device, efficiency: Efficiency):
        self.run, self.efficiency = run, efficiency
        self.model = _local_model(run.model, run.tp)
        self.shapes = Shapes.of(self.model)
        self.tokens = run.micro_tokens
        """Of a micro-batch; each tensor-parallel rank multiplies all of them."""
        self.stream_tokens = run.micro_tokens // (run.tp if run.sequence else 1)
        """Those between the tensor-parallel layers."""
        self.element = run.element_bytes
        peak = device.peak_16bit_tflops * 1e12
        self.peak = peak if run.precision != "fp32" else peak / 8  # TF32 and fp32 units
        self.dense_peak = self.peak * efficiency.matrix
        """FLOP/s of large products, without fp8."""
        self.block_peak = self.dense_peak
        """FLOP/s of a block's large products."""
        if run.precision == "fp8" and device.peak_fp8_tflops:
            self.block_peak = device.peak_fp8_tflops * 1e12 * efficiency.matrix_fp8
        self.bandwidth = device.memory_gb_s * 1e9 * efficiency.memory
        """Bytes/s of memory-bound kernels."""
        self.is_unfused_attention = self.model.attention == "reference"
        self.is_fused = run.is_compiled or run.engine == "megatron" or self.is_unfused_attention
        """Whether bias and GELU, and bias, dropout and residual sum, are one kernel each; they are
        in Megatron, of which Megatron-DeepSpeed's unfused attention is too.
        """

    def product(self, m: int, n: int, k: int, peak: float, accumulated_bytes: int = 0) -> float:
        """Seconds of [m, k] x [k, n], whose result is added to one of `accumulated_bytes` per
        element, or else is written with 2 or 4 bytes.
        """
        constants = self.efficiency
        is_fp8 = peak > self.dense_peak
        half_depth = constants.half_depth_fp8 if is_fp8 else constants.half_depth
        shape = m * n / (m * n + constants.half_outputs) * k / (k + half_depth)
        flops = 2 * m * n * k / (peak * shape * self._alignment(m, n, k))
        out = 2 * accumulated_bytes or self.element
        moved = self.element * k * (m + n) + out * m * n
        return max(flops, moved / self.bandwidth)

    def _alignment(self, *widths: int) -> float:
        if all(width % 64 == 0 for width in widths):
            return 1.0
        factor = self.efficiency.misaligned
        return factor if all(width % 8 == 0 for width in widths) else factor**2

    def block(self) -> PassTimes:
        """One transformer block."""
        products = self._block_products()
        attention = self._unfused_attention() if self.is_unfused_attention else self._attention()
        memory = self._block_memory()
        return PassTimes(
            products.forward + attention.forward + memory.forward,
            products.backward + attention.backward + memory.backward,
        )

    def attention_core(self) -> KernelTime:
        """Forward pass of scores, softmax and values alone."""
        times = self._unfused_attention() if self.is_unfused_attention else self._attention()
        return times.forward

    def block_params(self) -> int:
        """Elements of the matrices of a block on this rank."""
        return sum(k * n for k, n in self._matrices())

    def _matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each matrix of a block."""
        width, shapes = self.model.d_model, self.shapes
        ups = 2 if self.model.activation == "swiglu" else 1
        return [
            (width, shapes.d_qkv),
            (shapes.n_head * shapes.d_head, width),
            (width, ups * shapes.d_ff),
            (shapes.d_ff, width),
        ]

    def _block_products(self) -> PassTimes:
        forward = backward = 0.0
        m, peak = self.tokens, self.block_peak
        for k, n in self._matrices():
            forward += self.product(m, n, k, peak)
            backward += self.product(m, k, n, peak) + self._weight_gradient(k, n, peak)
        return PassTimes(KernelTime(matrix=forward, count=4), KernelTime(matrix=backward, count=8))

    def _weight_gradient(self, k: int, n: int, peak: float) -> float:
        """Seconds of a weight's gradient; Megatron adds it to the earlier ones in its kernel."""
        added = self.run.gradient_bytes if self.run.engine == "megatron" else 0
        return self.product(k, n, self.tokens, peak, accumulated_bytes=added)

    def _accumulation(self) -> float:
        """Bytes of adding a block's gradients to those of earlier micro-batches in its own kernels
        (ZeRO-3 adds the shards alone).
        """
        run = self.run
        if run.engine == "megatron" or run.accumulation == 1 or run.zero_stage == 3:
            return 0.0
        return self.block_params() * (2 * run.gradient_bytes + self.element)

    def _attention(self) -> PassTimes:
        """Fused attention."""
        run, constants, shapes = self.run, self.efficiency, self.shapes
        pairs = self.tokens * _keys_per_query(run.model, run.seq_len)
        forward_flops = 4 * pairs * shapes.n_head * shapes.d_head
        filled = run.seq_len / run.cp / (run.seq_len / run.cp + constants.half_keys)
        # tiles have 64 or 128 columns
        columns = -(-shapes.d_head // 64) * 64 / shapes.d_head
        kernel = 1.0 if run.is_transformer_engine else constants.flash
        flop_s = self.peak * kernel * filled / columns
        forward = forward_flops / (flop_s * constants.attention_forward)
        backward = 2.5 * forward_flops / (flop_s * constants.attention_backward)
        return PassTimes(
            KernelTime(attention=forward, count=1), KernelTime(attention=backward, count=3)
        )

    def _unfused_attention(self) -> PassTimes:
        """Two batched products of all T x T scores, and passes over the scores: softmax with mask
        (one kernel), dropout with its mask of bytes.
        """
        run, shapes = self.run, self.shapes
        heads = run.micro * shapes.n_head
        queries, width = run.seq_len // run.cp, shapes.d_head
        scores = heads * queries * run.seq_len
        is_aligned = width % 8 == 0
        factor = 1.0 if is_aligned else self.efficiency.unaligned
        flop_s = self.dense_peak * factor
        product = max(
            2 * scores * width / flop_s,
            (scores + 2 * heads * run.seq_len * width) * self.element / (self.bandwidth * factor),
        )
        dropout = self.model.dropout > 0
        forward_bytes = scores * (2 * self.element + dropout * (2 * self.element + 1))
        backward_bytes = scores * (3 * self.element + dropout * (2 * self.element + 1))
        return PassTimes(
            KernelTime(attention=2 * product + forward_bytes / self.bandwidth, count=8),
            KernelTime(attention=4 * product + backward_bytes / self.bandwidth, count=10),
        )

    def _block_memory(self) -> PassTimes:
        """Norms, residual sums, biases, activation, rotation, casts: bytes that they move."""
        model, shapes, element = self.model, self.shapes, self.element
        fused = self.is_fused
        stream = self.stream_tokens * model.d_model * element
        hidden = self.tokens * shapes.d_ff * element
        qkv = self.tokens * shapes.d_qkv * element
        # 1. norms (read, write); residual sums (two reads, a write), and the kernels before them
        norms, sums = 2 * 2, 2 * 3
        separate = 0 if fused else 2 * 2 * (model.bias + (model.dropout > 0))
        compiled = 0.7 if self.run.is_compiled else 1.0  # norm and sum in one kernel
        forward = compiled * (norms + sums + separate) * stream
        backward = compiled * (2 * 4 + 2 * 2 + separate / 2) * stream
        # 2. activation
        up = 3 if model.activation == "swiglu" else 2
        forward += hidden * (up if fused else up + 2)
        backward += hidden * ((up + 2) if fused else up + 4)
        # 3. rotation, and copies of q, k, v into the layout that attention reads
        rotation = 2 if fused else 4
        copies = (rotation if model.position == "rotary" else 0) + 2
        forward, backward = forward + copies * qkv, backward + copies * qkv
        if self.run.precision == "fp8":  # casts of inputs and of gradients, also transposed
            inputs = sum(k for k, _ in self._matrices()) * self.tokens
            outputs = sum(n for _, n in self._matrices()) * self.tokens
            forward, backward = forward + 4 * inputs, backward + 4 * outputs
        backward += self._accumulation()
        kernels = 8 if self.run.is_compiled else 14 if fused else 18
        return PassTimes(
            KernelTime(memory=forward / self.bandwidth, count=kernels),
            KernelTime(memory=backward / self.bandwidth, count=1.5 * kernels),
        )

    def embedding(self) -> PassTimes:
        """Look-up and its gradient."""
        moved = self.tokens * self.model.d_model * self.element
        return PassTimes(
            KernelTime(memory=3 * moved / self.bandwidth, count=5),
            KernelTime(memory=4 * moved / self.bandwidth, count=5),
        )

    def head(self) -> PassTimes:
        """Final norm, head and cross entropy of float32 logits."""
        width, vocab, m = self.model.d_model, self.model.vocab_size, self.tokens
        peak = self.dense_peak
        forward = self.product(m, vocab, width, peak)
        backward = self.product(m, width, vocab, peak) + self.product(width, vocab, m, peak)
        if self.run.is_compiled:  # one read and one pass for the gradient, as measured
            passes = 5, 4
        elif self.run.engine == "megatron" or self.is_unfused_attention:
            # forward: cast (2 + 4), maximum (4), difference (8), exponential (8), sum (4);
            # backward: product with the gradient (8), cast (4 + 2)
            passes = 30, 14
        else:  # torch's cross entropy: cast (2 + 4), log-softmax (12)
            passes = 18, 14
        logits = m * vocab / self.bandwidth
        return PassTimes(
            KernelTime(matrix=forward, memory=passes[0] * logits, count=10),
            KernelTime(matrix=backward, memory=passes[1] * logits, count=10),
        )


def _keys_per_query(model: ModelConfig, seq_len: int) -> float:
    """Keys that a query attends to, mean over queries and blocks."""
    if model.window is None:
        return seq_len / 2
    total = 0.0
    for block in range(model.n_layer):
        keys = min(block_window(model, block) or seq_len, seq_len)
        total += keys * (2 * seq_len - keys) / (2 * seq_len)
    return total / model.n_layer
