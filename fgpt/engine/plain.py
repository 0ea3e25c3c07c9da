"""The reference engine ("oracle"): one process, torch only. Parity compares all others with it.

Mixed precision as in DeepSpeed: the model computes with rounded copies of float32 master weights,
gradients are accumulated and clipped in float32, and the optimizer updates the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgpt.config.deepspeed.settings import DeepSpeedSettings
from fgpt.data.loader import MicroBatch
from fgpt.engine.base import AsyncScalars, PendingStep, SavedFile, batch_context
from fgpt.engine.tensor_files import PLAIN_FILE, read_tensors, write_tensors
from fgpt.model.gpt import GPT
from fgpt.optim.build import keep_group_options, make_optimizer, parameter_groups
from fgpt.optim.schedules import learning_rate
from fgpt.parallel.grad_norm import sum_of_squares


class PlainEngine:
    """An `Engine` with the DeepSpeed JSON's Adam(W), schedule and clipping, without DeepSpeed."""

    def __init__(
        self,
        model: GPT,
        deepspeed_json: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ):
        self.model: nn.Module = model.to(device=device, dtype=dtype)
        self.context = model.context
        self.device = device
        self.seed = seed
        self.step = 0
        self.skipped_steps = 0
        self.on_gradients: Callable[[], None] | None = None
        self.clip: float = deepspeed_json.get("gradient_clipping", 0.0)
        self.scheduler = deepspeed_json.get("scheduler")
        self.base_lr: float = deepspeed_json["optimizer"].get("params", {}).get("lr", 1e-3)
        # (parameter, float32 master); in fp32 they are the same tensor
        self.masters: list[tuple[nn.Parameter, Tensor]] = []
        groups = parameter_groups(self.model)
        for group in groups:
            group["params"] = [self._add_master(p) for p in group["params"]]
        self.optimizer = make_optimizer(deepspeed_json["optimizer"], groups)

    def _add_master(self, parameter: nn.Parameter) -> Tensor:
        is_float32 = parameter.dtype == torch.float32
        master = parameter if is_float32 else parameter.detach().float().requires_grad_()
        self.masters.append((parameter, master))
        return master

    def train_batch(self, micro_batches: Sequence[MicroBatch]) -> PendingStep:
        self.model.train()
        # 1. accumulate the mean gradient of all micro-batches
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches):
            loss = self._loss(batch, first_sample=number * len(batch.inputs)) / len(micro_batches)
            loss.backward()
            self._accumulate_gradients()
            total += loss.detach().float()
        if self.on_gradients is not None:
            self.on_gradients()
        # 2. clip and apply it, unless it is not finite
        masters = [master for _, master in self.masters]
        gradients = [master.grad for master in masters if master.grad is not None]
        norm = sum_of_squares(gradients, self.device).sqrt().float()
        rate = learning_rate(self.scheduler, self.base_lr, self.step - self.skipped_steps)
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            if self.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(masters, self.clip, norm)
            self._update_weights(rate)
        self.optimizer.zero_grad()
        self.step += 1
        self.skipped_steps += skipped
        return PendingStep(AsyncScalars(total, norm, float(skipped)), rate)

    def _loss(self, batch: MicroBatch, first_sample: int = 0) -> Tensor:
        """Return the mean loss [] of a micro-batch; `first_sample`: its index."""
        with self.context.activate(
            batch_context(batch, self.device, self.seed, self.step, first_sample)
        ):
            inputs, targets = (
                ids.to(self.device, non_blocking=True) for ids in (batch.inputs, batch.targets)
            )
            loss: Tensor = self.model(inputs, targets)
        return loss

    def _accumulate_gradients(self) -> None:
        """Add the model's gradients to the masters' in float32."""
        for parameter, master in self.masters:
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    @torch.no_grad()
    def _update_weights(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        rounded = [(p, m) for p, m in self.masters if p is not m]
        if rounded:
            parameters, masters = zip(*rounded, strict=True)
            torch._foreach_copy_(parameters, masters)

    @torch.no_grad()
    def eval_batches(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        self.model.eval()
        return torch.stack([self._loss(batch).float() for batch in micro_batches]).mean()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.detach()) for name, p in self.model.named_parameters())

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        masters = dict(self.masters)
        for name, parameter in self.model.named_parameters():
            gradient = masters[parameter].grad
            assert gradient is not None, "only valid inside on_gradients"
            yield name, gradient

    def save(self, directory: Path) -> list[SavedFile]:
        state = {
            "masters": [master.detach() for _, master in self.masters],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "skipped_steps": self.skipped_steps,
        }
        return [write_tensors(state, directory / PLAIN_FILE)]

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        state = read_tensors(directory / PLAIN_FILE, self.device)
        for (parameter, master), saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
            if parameter is not master:
                parameter.copy_(saved)
        with keep_group_options(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]

    def open_monitors(
        self, settings: DeepSpeedSettings, run_dir: Path, warn: Callable[[str], None]
    ) -> None:
        """Do nothing: the monitors belong to DeepSpeed."""

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
