"""Small agreements between ranks. Values travel as JSON bytes in tensors; nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fgpt.errors import FgptError, TrainingError, UserError

T = TypeVar("T")
E = TypeVar("E", bound=FgptError)


def gather_json(
    value: Any, device: torch.device, group: dist.ProcessGroup | None = None
) -> list[Any]:
    """Return every rank's JSON value in rank order, on all ranks of the group."""
    text = json.dumps(value).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    size = torch.tensor([len(text)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8, device=device)
    padded[: len(text)] = data
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return [
        json.loads(bytes(data[: int(n)].cpu().numpy()))
        for data, n in zip(gathered, sizes, strict=True)
    ]


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average a tensor over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
        value.div_(dist.get_world_size())
    return value


def all_reduce_max(number: int, device: torch.device) -> Tensor:
    """Return the maximum over all ranks, int64 [] on the device; does not synchronize with it."""
    value = torch.full((), number, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def max_over_ranks(number: int, device: torch.device) -> int:
    """Return the maximum over all ranks."""
    return int(all_reduce_max(number, device))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return True on all ranks if the flag is True on any rank."""
    return bool(max_over_ranks(int(flag), device))


def run_on_all(
    action: Callable[[], T], device: torch.device, group: dist.ProcessGroup | None = None
) -> T:
    """Run `action` on every rank; if it fails on one, all ranks raise the first rank's error.

    Handles FgptError and OSError. Other exceptions are bugs and propagate at once.
    """
    # 1. run, and keep an expected error
    failure: FgptError | None = None
    try:
        result = action()
    except FgptError as error:
        failure = error
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        failure = TrainingError(f"{error.strerror or error}{where}")
    # 2. exchange the errors
    report = None if failure is None else [str(failure), isinstance(failure, UserError)]
    failures = [(rank, f) for rank, f in enumerate(gather_json(report, device, group)) if f]
    # 3. no error: return; else all raise the error of the lowest rank
    if not failures:
        return result
    if failure is None or failures[0][0] != dist.get_rank():
        rank, (text, is_user_error) = failures[0]
        text = text if rank == 0 else f"rank {rank}: {text}"
        failure = (UserError if is_user_error else TrainingError)(text)
    raise agreed(failure)


def agreed(error: E) -> E:
    """Mark an error that every rank raises; returns it."""
    error.agreed = True
    return error


def run_on_rank0_for_long(
    action: Callable[[], Any], device: torch.device, store: dist.Store, timeout: timedelta
) -> None:
    """Like `run_on_rank0`, without a result: the others wait at the store, for up to `timeout`.

    A collective would end by the timeout of its group.
    """
    key = f"fgpt/run on rank 0/{gather_json(os.urandom(8).hex(), device)[0]}"

    def act_or_wait() -> None:
        if dist.get_rank() == 0:
            try:
                action()
            finally:
                store.set(key, "")
        else:
            store.wait([key], timeout)

    run_on_all(act_or_wait, device)


def run_on_rank0(
    action: Callable[[], Any], device: torch.device, group: dist.ProcessGroup | None = None
) -> Any:
    """Run `action` on rank 0 only; every rank returns its JSON result, or raises its error.

    `group`: all ranks, with another timeout or backend than the default group.
    """
    result = run_on_all(lambda: action() if dist.get_rank() == 0 else None, device, group)
    return gather_json(result, device, group)[0]
