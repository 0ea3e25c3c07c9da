"""What a rank measures: FGPT's engine or transformers' model, on the same batches of random ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fgpt.bench.job import Job
from fgpt.config.resolve import Resolved
from fgpt.config.schema import ModelConfig
from fgpt.data.loader import MicroBatch, MicroBatches
from fgpt.data.samples import SampleBatch
from fgpt.distributed.launch import World
from fgpt.engine.base import AsyncScalars, Engine, PendingStep
from fgpt.engine.build import build_engine
from fgpt.optim.build import make_optimizer, parameter_groups
from fgpt.parallel.topology import Grid
from fgpt.utils.process import keep_freed_memory

DISTINCT_BATCHES = 2
"""Global batches before the samples repeat. With so few the loss falls within the warmup steps, and
a variant that computes something else shows.
"""


class RandomSamples:
    """Numbered samples of random ids, as `Samples`; the ids do not change what a step costs."""

    def __init__(self, vocab_size: int, seq_len: int, n_samples: int):
        self.seq_len = seq_len
        self.samples_per_epoch = n_samples
        generator = np.random.default_rng(1234)
        self.ids = generator.integers(0, vocab_size, (n_samples, seq_len + 1), dtype=np.int64)

    def batch(self, numbers: np.ndarray) -> SampleBatch:
        """Return the samples of these numbers."""
        ids = self.ids[numbers % len(self.ids)]
        return SampleBatch(
            np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), None
        )


def batches_for(resolved: Resolved, world: World, device: torch.device) -> MicroBatches:
    """This rank's micro-batches, prefetched by a thread as in training."""
    batch = resolved.batch
    n_samples = DISTINCT_BATCHES * batch.global_size
    return MicroBatches(
        RandomSamples(resolved.run.model.vocab_size, resolved.seq_len, n_samples),
        micro=batch.micro,
        accumulation=batch.accumulation,
        dp_rank=Grid.of(batch).coordinates(world.rank).data,
        dp_size=batch.dp,
        pin=device.type == "cuda",
    )


def load_libraries(job: Job) -> None:
    """Import what `build_target` needs: the slowest part of the start, and single-threaded."""
    if job.target != "fgpt":
        _ = import_module("transformers").GPT2LMHeadModel  # triggers its lazy import
    elif job.overrides.get("train.engine") != "plain":
        import_module("deepspeed")


def build_target(
    job: Job, resolved: Resolved, world: World, device: torch.device
) -> Engine | Transformers:
    """Build FGPT's engine as for training, or transformers' model with its loop."""
    if job.target == "fgpt":
        return build_engine(resolved, world, device)
    return Transformers(
        resolved,
        device,
        bf16_weights=job.target == "transformers, bf16 weights",
        compiled=job.target == "transformers, compiled",
    )


class Transformers:
    """GPT2LMHeadModel of the same shape in a plain loop with fused AdamW and clipping.

    In bf16 it runs under autocast. `bf16_weights` is its fastest form: weights and moments in bf16,
    GELU in one kernel, and FGPT's malloc settings.
    """

    def __init__(
        self, resolved: Resolved, device: torch.device, *, bf16_weights: bool, compiled: bool
    ):
        if bf16_weights and device.type == "cpu":
            keep_freed_memory(os.environ)
        model = _gpt2(resolved.run.model, "gelu_pytorch_tanh" if bf16_weights else "gelu_new")
        self.model: nn.Module = model.to(device, torch.bfloat16 if bf16_weights else torch.float32)
        self.forward: Any = torch.compile(self.model) if compiled else self.model
        self.device = device
        self.autocast = resolved.precision == "bf16" and not bf16_weights
        self.clip = resolved.deepspeed["gradient_clipping"]
        self.optimizer = make_optimizer(
            resolved.deepspeed["optimizer"], parameter_groups(self.model.named_parameters())
        )

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> PendingStep:
        """Take one optimizer step on transformers' own loss, over the same targets as FGPT's."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self._loss(batch) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        grad_norm = skipped = learning_rate = 0.0  # not used
        return PendingStep(AsyncScalars(total, grad_norm, skipped), learning_rate)

    @torch.no_grad()
    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return the mean loss []."""
        self.model.eval()
        return torch.stack([self._loss(batch) for batch in micro_batches]).mean()

    def close(self) -> None:
        """Do nothing."""

    def _loss(self, batch: MicroBatch) -> Tensor:
        ids = batch.inputs.to(self.device, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            # the targets are shifted already; labels=ids would have the model shift them
            loss: Tensor = self.forward(input_ids=ids, shift_labels=targets, labels=targets).loss
        return loss.float()


def _gpt2(config: ModelConfig, activation: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    gpt2_config = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_seq_len,
        n_embd=config.d_model,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = transformers.GPT2LMHeadModel(gpt2_config)
    model.set_attn_implementation("sdpa")
    return model
