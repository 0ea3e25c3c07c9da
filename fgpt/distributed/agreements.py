"""Small agreements between ranks. They travel as JSON bytes in tensors: nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fgpt.errors import FgptError, TrainingError, UserError

T = TypeVar("T")


def gather_json(
    value: Any, device: torch.device, group: dist.ProcessGroup | None = None
) -> list[Any]:
    """Every rank's `value` (anything JSON can say), in rank order, on every rank of the group."""
    text = json.dumps(value).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    size = torch.tensor([len(text)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(text)] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [
        json.loads(bytes(part[: int(n)].cpu().numpy()))
        for part, n in zip(parts, sizes, strict=True)
    ]


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
        value.div_(dist.get_world_size())
    return value


def all_reduce_max(number: int, device: torch.device) -> Tensor:
    """The largest of the ranks' numbers, int64 [], on the device: nobody waits for it here."""
    value = torch.full((), number, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    return int(all_reduce_max(number, device))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank; the same answer on all."""
    return bool(max_over_ranks(int(flag), device))


def run_on_all(
    action: Callable[[], T], device: torch.device, group: dist.ProcessGroup | None = None
) -> T:
    """Do something on every rank; if it fails on one, all raise what that one raised.

    Only FgptError and OSError are expected; other exceptions are bugs and leave at once.
    """
    result: T | None = None
    failure: FgptError | None = None
    try:
        result = action()
    except FgptError as error:
        failure = error
    except OSError as error:
        failure = TrainingError(f"{error.strerror or error}: {error.filename or 'no file named'}")
    mine = None if failure is None else [str(failure), isinstance(failure, UserError)]
    failures = [(rank, f) for rank, f in enumerate(gather_json(mine, device, group)) if f]
    if not failures:
        return result  # type: ignore[return-value]  # no failure anywhere: the action returned
    if failure is not None and failures[0][0] == dist.get_rank():
        raise failure
    rank, (text, is_user_error) = failures[0]
    text = text if rank == 0 else f"rank {rank}: {text}"
    raise (UserError if is_user_error else TrainingError)(text)


def run_on_rank0(
    action: Callable[[], Any], device: torch.device, group: dist.ProcessGroup | None = None
) -> Any:
    """Do something on rank 0 only; every rank gets its JSON result, or its error.

    `group`: all ranks, for waiting longer than usual.
    """

    def on_leader() -> Any:
        return action() if dist.get_rank() == 0 else None

    result = run_on_all(on_leader, device, group)
    return gather_json(result, device, group)[0]
