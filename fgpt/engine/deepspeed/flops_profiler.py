"""DeepSpeed's flops profiler with true counts.

Upstream counts calls of torch.nn.functional, which replaced products (oneDNN, fp8, column-parallel
layers, the fused head) do not make: it misses nine tenths of the FLOPs. Here torch's dispatcher
shows every matrix product, and only these count, as in `fgpt.model.count`. Fused attention counts
as if it computed all scores; attention within documents, the scores within each, and within a
window, as many as it has tokens for each query.

Upstream also prints a page per micro-batch, each with the time of all micro-batches, and starts the
model's own clock at the epoch. Here one page covers a whole step of rank 0.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.profiling.flops_profiler import FlopsProfiler
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fgpt.model.embedding import Head

FUSED_HEAD_PRODUCTS = 3
"""The fused loss computes its two gradient products in the forward pass, each as large as it."""


def _attention_flops(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their mix of the values: q [.., T, K], k [.., S, K]."""
    return 4 * q.numel() * k.shape[-2]


def _blocked_flops(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, *_: Any, **__: Any
) -> int:
    """The same within a window."""
    return 4 * q.numel() * min(window or k.shape[-2], k.shape[-2])


def _varlen_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *others: Any,
    window_size: Any = None,
    **_: Any,
) -> int:
    """The same for documents of a packed batch: q [N, H, K], their first tokens."""
    window = window_size or (others[5] if len(others) > 5 else None)
    earlier = window[0] if window else -1
    lengths = offsets.diff()
    keys = lengths if earlier < 0 else lengths.clamp(max=earlier + 1)
    return 4 * int((lengths * keys).sum()) * q.shape[1] * q.shape[2]


def _product_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """a [.., K], b [N, K]."""
    return 2 * a.numel() * b.shape[0]


FORMULAS: Mapping[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    "fgpt::blocked_attention": _blocked_flops,
    "fgpt::dropout_attention": _blocked_flops,
    "torch_attn::_varlen_attn": _varlen_flops,
    "fgpt::onednn_product": _product_flops,
}
"""Operators that torch's `flop_registry` lacks -> their FLOPs."""


class FlopsByModule(TorchDispatchMode):
    """A context that counts the FLOPs of matrix products by the innermost running module."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.flops: Counter[nn.Module] = Counter()
        self._running = [model]

    def __enter__(self) -> FlopsByModule:
        self._hooks = (
            register_module_forward_pre_hook(lambda module, _: self._running.append(module)),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        )
        super().__enter__()
        return self

    def _leave(self) -> None:
        if len(self._running) > 1:  # the model itself was entered before this context
            self._running.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops[self._running[-1]] += formula(*args, **(kwargs or {}), out_val=out)
        elif (own := FORMULAS.get(func.name().partition(".")[0])) is not None:
            self.flops[self._running[-1]] += own(*args, **(kwargs or {}))
        return out


class StepFlopsProfiler(FlopsProfiler):
    """A `FlopsProfiler` of one optimizer step, with the FLOPs of `FlopsByModule`."""

    ds_engine: Any

    def __init__(self, engine: DeepSpeedEngine, samples_per_rank: float):
        """`samples_per_rank`: the global batch divided by the number of ranks."""
        super().__init__(engine.module, engine, engine.flops_profiler_recompute_fwd_factor())
        self.samples_per_rank = samples_per_rank
        self.step_flops: Counter[nn.Module] = Counter()
        self._counting = contextlib.ExitStack()

    def start_profile(self, ignore_list: Any = None) -> None:
        """Start counting a micro-batch; an evaluation does not count."""
        if not self.model.training:
            return
        super().start_profile(ignore_list)
        # compiled code would be compiled again for the profiler's hooks, within the measured time
        self._counting.enter_context(torch.compiler.set_stance("force_eager"))
        counter = self._counting.enter_context(FlopsByModule(self.model))
        self._counting.callback(lambda: self.step_flops.update(counter.flops))
        self.model.__start_time__ = time.time()

    def reset_profile(self) -> None:
        """Start from zero, in a step's first micro-batch."""
        if self.started:
            return
        super().reset_profile()
        self.step_flops.clear()
        for module in self.model.modules():  # ZeRO-3's parameters are empty outside their layers
            sizes = (getattr(p, "ds_numel", p.numel()) for p in module.parameters())
            module.__params__ = sum(sizes)

    def stop_profile(self) -> None:
        """End a micro-batch, and replace upstream's counts of the step."""
        super().stop_profile()
        self._counting.close()
        if not self.started:
            return
        for module in self.model.modules():
            fused = isinstance(module, Head) and module.fused
            flops = self.step_flops[module] // (FUSED_HEAD_PRODUCTS if fused else 1)
            module.__flops__, module.__macs__ = flops, flops // 2

    def print_model_profile(self, *args: Any, **options: Any) -> None:
        """Print after the step's last micro-batch."""
        engine = self.ds_engine
        if engine.is_gradient_accumulation_boundary():
            self.ds_engine = _StepOf(engine, self.samples_per_rank)
            try:
                super().print_model_profile(*args, **options)
            except OSError as error:
                file = options.get("output_file") or error.filename
                print(f"flops_profiler.output_file: {file}: {error.strerror}; printed:")
                super().print_model_profile(*args, **{**options, "output_file": None})
            self.ds_engine = engine

    def end_profile(self) -> None:
        """End after the step's last micro-batch."""
        if self.ds_engine.is_gradient_accumulation_boundary():
            super().end_profile()


class _StepOf:
    """An engine whose batch is a step's: upstream's page divides the micro-batch by its time."""

    def __init__(self, engine: DeepSpeedEngine, samples_per_rank: float):
        self.train_micro_batch_size_per_gpu = lambda: samples_per_rank
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
