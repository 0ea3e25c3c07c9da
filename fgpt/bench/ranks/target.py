"""What is measured: an engine with batches of random ids, or the peer with the same ones."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fgpt.bench.job import Job
from fgpt.bench.workloads import Subject
from fgpt.config.resolve import Resolved
from fgpt.config.schema import ModelConfig
from fgpt.data.loader import MicroBatch, MicroBatches
from fgpt.data.samples.token_rows import Rows
from fgpt.distributed.launch import World
from fgpt.engine.base import AsyncScalars
from fgpt.engine.build import build_engine
from fgpt.optim.build import make_adam, parameter_groups
from fgpt.parallel.topology import Grid
from fgpt.utils.process import keep_freed_memory

DISTINCT = 2
"""Global batches before the samples come again: few, so that the loss falls within some steps, and
a step that computes something else shows.
"""


class RandomSamples:
    """Numbered samples of random ids; what they are does not change what a step costs."""

    def __init__(self, vocab_size: int, seq_len: int, n_samples: int):
        """`n_samples`: distinct ones."""
        self.seq_len = seq_len
        generator = np.random.default_rng(1234)
        self.ids = generator.integers(0, vocab_size, (n_samples, seq_len + 1), dtype=np.int64)

    @property
    def samples_per_epoch(self) -> int:
        """See `Samples`."""
        return len(self.ids)

    def batch(self, numbers: np.ndarray) -> Rows:
        """See `Samples`."""
        rows = self.ids[numbers % len(self.ids)]
        return Rows(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:]), None)


class Steps(Protocol):
    """What `fgpt bench` needs of an engine."""

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> Any:
        """One optimizer step; its `result()` has a `loss`."""
        ...

    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Mean loss [] without gradients."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


def batches_for(resolved: Resolved, world: World, device: torch.device) -> MicroBatches:
    """This rank's micro-batches, read ahead by a thread as in training."""
    batch = resolved.batch
    samples = RandomSamples(
        resolved.run.model.vocab_size, resolved.seq_len, DISTINCT * batch.global_size
    )
    return MicroBatches(
        samples,
        micro=batch.micro,
        accumulation=batch.accumulation,
        dp_rank=Grid.of(batch).coordinates(world.rank).data,
        dp_size=batch.dp,
        pin=device.type == "cuda",
    )


def load_libraries(job: Job) -> None:
    """Import what `steps_for` will need: that takes longer than all else, and only one core."""
    if job.subject != "fgpt":
        _ = import_module("transformers").GPT2LMHeadModel  # it imports its parts when asked for
    elif dict(job.sets).get("train.engine") != "plain":
        import_module("deepspeed")


def steps_for(job: Job, resolved: Resolved, world: World, device: torch.device) -> Steps:
    """FGPT's engine as for training, or the peer."""
    if job.subject == "fgpt":
        return build_engine(resolved, world, device)
    return Transformers(resolved, device, job.subject)


class Transformers:
    """GPT2LMHeadModel of the same shape in a plain loop with fused AdamW and clipping; for bf16
    under autocast, or at its fastest: weights and moments in bf16, freed memory kept as by FGPT.
    """

    def __init__(self, resolved: Resolved, device: torch.device, subject: Subject):
        half = subject == "transformers, bf16 weights"
        compiled = subject == "transformers, compiled"
        dtype = torch.bfloat16 if half else torch.float32
        if half and device.type == "cpu":
            keep_freed_memory(os.environ)
        gelu = "gelu_pytorch_tanh" if half else "gelu_new"  # in one kernel, and as it comes
        self.model: nn.Module = _gpt2(resolved.run.model, gelu).to(device, dtype)
        self.run: Any = torch.compile(self.model) if compiled else self.model
        self.device = device
        self.autocast = resolved.precision == "bf16" and not half
        self.clip = resolved.deepspeed["gradient_clipping"]
        groups = parameter_groups(self.model)
        self.optimizer = make_adam(resolved.deepspeed["optimizer"], groups)

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> Any:
        """See `Steps`; the model's own loss, over the targets that FGPT has."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self._loss(batch) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Lost(AsyncScalars(total))

    @torch.no_grad()
    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """See `Steps`."""
        self.model.eval()
        return torch.stack([self._loss(batch) for batch in micro_batches]).mean()

    def close(self) -> None:
        """Nothing to release."""

    def _loss(self, batch: MicroBatch) -> Tensor:
        ids = batch.inputs.to(self.device, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            # already the successors: the model's own shift by one is for labels = ids
            loss: Tensor = self.run(input_ids=ids, shift_labels=targets, labels=targets).loss
        return loss.float()


@dataclasses.dataclass(frozen=True)
class Lost:
    """A step of the peer's, read as late as FGPT's."""

    numbers: AsyncScalars

    @property
    def loss(self) -> float:
        """Mean loss of the step's micro-batches."""
        return self.numbers.read()[0]

    def result(self) -> Lost:
        """As `PendingStep`."""
        return self


def _gpt2(config: ModelConfig, activation: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    shape = transformers.GPT2Config(
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
    model: Any = transformers.GPT2LMHeadModel(shape)
    model.set_attn_implementation("sdpa")
    return model
