"""Metrics: a console line per log interval, a JSON line per step, scalars for the monitors.

tokens/s    tokens of the global batch per second, data loading included
data        share of the time spent waiting for data
TFLOP/s     model FLOPs (full attention, without recomputation) per second and rank
MFU         TFLOP/s divided by the device's 16-bit peak, if `fgpt.plan.hardware` lists the device
memory      peak of rank 0 so far: allocated on a GPU, resident on a CPU
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from fgpt.config.resolve import Resolved
from fgpt.engine.base import Engine
from fgpt.model.count import training_flops_per_token
from fgpt.train.loop import StepEvent
from fgpt.utils.console import Outage
from fgpt.utils.files import no_follow
from fgpt.utils.process import peak_resident_bytes

if TYPE_CHECKING:
    from fgpt.evaluation.interval import Estimate

GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return peak_resident_bytes() / GIB


def format_duration(seconds: float) -> str:
    """Return h:mm:ss, or m:ss below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


class Metrics:
    """Rank 0's record of a run: a hook of the training loop."""

    def __init__(
        self,
        resolved: Resolved,
        engine: Engine,
        path: Path,
        console: Console,
        device: torch.device,
        tokens_before: int = 0,
    ):
        """`tokens_before`: seen by the run until the engine's present step."""
        run, batch = resolved.run, resolved.batch
        self.engine, self.console, self.device = engine, console, device
        self.every, self.last_step = run.train.log_every, run.train.steps
        self.ramp, self.seq_len = resolved.ramp, resolved.seq_len
        self.skipped_steps = engine.skipped_steps
        self.origin = engine.step, tokens_before
        flops = training_flops_per_token(run.model, resolved.seq_len)
        self.tflop_per_token_and_rank = flops / batch.world / 1e12
        self.peak: float | None = None
        if device.type == "cuda":
            from fgpt.plan.hardware import peak_tflops

            self.peak = peak_tflops(torch.cuda.get_device_name(device), resolved.precision)
        self.recent: deque[StepEvent] = deque(maxlen=self.every)
        self.file = open(path, "ab", buffering=0, opener=no_follow)  # closed by close()
        self.pending = b""
        """Lines not written yet: a full disk does not end the run."""
        self._writing = threading.Lock()
        """A rank that leaves flushes in another thread."""
        self.outage = Outage(lambda text: console.print(text, style="bold red", highlight=False))

    def __call__(self, event: StepEvent) -> None:
        """Record one step; print a line every `train.log_every` steps."""
        self.recent.append(event)
        result = event.result
        self.skipped_steps += result.skipped
        record: dict[str, Any] = {
            "step": event.step,
            "time": time.time(),
            "tokens": self.origin[1] + self._tokens_between(self.origin[0], event.step),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": result.skipped,
            "step_s": event.elapsed_s,
            "data_wait_s": event.data_wait_s,
            **self._recent_means(),
        }
        if result.loss_scale is not None:
            record["loss_scale"] = result.loss_scale
        self._write(record)
        if event.step % self.every == 0 or event.step == self.last_step:
            self.flush()
            scalars = {f"train/{k}": float(v) for k, v in record.items() if v is not None}
            del scalars["train/step"], scalars["train/time"]
            scalars["train/samples"] = self.ramp.samples_before(event.step)
            self.engine.log_scalars(scalars, event.step)
            self.console.print(self._line(event, record), highlight=False)

    def record_evaluation(
        self, step: int, valid_loss: float, of_average: float | None = None
    ) -> None:
        """Record and print one evaluation; `of_average`: the moving average's loss."""
        record, scalars = {"step": step, "valid_loss": valid_loss}, {"valid/loss": valid_loss}
        text = f"step {step:>6}/{self.last_step}  [bold]valid loss {valid_loss:.4f}[/bold]"
        if of_average is not None:
            record["valid_loss_ema"] = scalars["valid/loss_ema"] = of_average
            text += f"  of the moving average {of_average:.4f}"
        self._write(record)
        self.flush()
        self.engine.log_scalars(scalars, step)
        self.console.print(text, highlight=False)

    def record_suite(self, step: int, name: str, values: Mapping[str, Estimate]) -> None:
        """Record and print the answers to a suite of questions."""
        self._write({"step": step, "suite": name, **{k: v.to_json() for k, v in values.items()}})
        self.flush()
        scalars = {f"{name}/{key}": estimate.value for key, estimate in values.items()}
        self.engine.log_scalars(scalars, step)
        texts = [f"{key.replace('_', ' ')} {estimate}" for key, estimate in values.items()]
        self.console.print(
            f"step {step:>6}/{self.last_step}  {name}: {', '.join(texts)}",
            highlight=False,
            markup=False,
        )

    def _recent_means(self) -> dict[str, float | None]:
        """Return speeds over the last log interval, and the peak memory."""
        total_s = sum(event.elapsed_s for event in self.recent)
        tokens = sum(self._tokens_between(e.step - 1, e.step) for e in self.recent)
        tflops = self.tflop_per_token_and_rank * tokens / total_s
        return {
            "tokens_per_s": tokens / total_s,
            "data_wait": sum(event.data_wait_s for event in self.recent) / total_s,
            "tflops_per_s_per_rank": tflops,
            "mfu": None if self.peak is None else tflops / self.peak,
            "memory_gib": peak_memory_gib(self.device),
        }

    def _tokens_between(self, begin: int, end: int) -> int:
        """Tokens of the steps after `begin` up to `end`."""
        before = self.ramp.samples_before
        return (before(end) - before(begin)) * self.seq_len

    def _line(self, event: StepEvent, record: dict[str, Any]) -> str:
        mfu = "" if record["mfu"] is None else f"  mfu {record['mfu']:.1%}"
        remaining = self._tokens_between(event.step, self.last_step)
        remaining_s = remaining / record["tokens_per_s"]
        eta = format_duration(remaining_s)
        return (
            f"step {event.step:>6}/{self.last_step}  loss {record['loss']:.4f}"
            f"  lr {record['learning_rate']:.2e}  norm {record['grad_norm']:.2f}"
            f"  {record['tokens_per_s']:,.0f} tokens/s"
            f"  {record['tflops_per_s_per_rank']:.3g} TFLOP/s/rank{mfu}"
            f"  data {record['data_wait']:.1%}  {record['memory_gib']:.2f} GiB  eta {eta}"
            + (f"  [red]skipped {self.skipped_steps}[/red]" if self.skipped_steps else "")
        )

    def flush(self) -> None:
        """Write all pending lines; called before a checkpoint, so that it never misses metrics.

        Lines that do not fit on the disk stay pending.
        """
        try:
            with self._writing:
                while self.pending:
                    self.pending = self.pending[self.file.write(self.pending) :]
        except OSError as error:
            self.outage.failed(
                f"{self.file.name}: {error.strerror}: records stay in memory until they can be"
                " written"
            )
        else:
            self.outage.succeeded(f"{self.file.name}: all records are written")

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        self.file.close()
        if missing := self.pending.count(b"\n"):
            self.console.print(
                f"{self.file.name}: the last {missing} records are lost", style="bold red"
            )

    def _write(self, record: dict[str, Any]) -> None:
        with self._writing:
            self.pending += json.dumps(record).encode() + b"\n"
