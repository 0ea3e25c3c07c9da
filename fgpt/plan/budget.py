"""What a token budget costs: days, energy and money, with the failures of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from fgpt.model.count import n_params
from fgpt.plan.failures import DEVICE_MTBF_H, Goodput, goodput
from fgpt.plan.search import Candidate

STATE_BYTES = 12
"""Of one parameter in a checkpoint: fp32 weights and Adam's two states."""
HOST_COPY_GB_S = 10.0
"""From one device to page-locked host memory, while its neighbours copy too."""
STORAGE_GB_S = 2.0
"""That one node writes to shared storage."""
NODE_SHARE_OF_POWER = 0.4
"""Power of processors, fans, network and losses of a node, as a share of its devices' (DGX H100:
10.2 kW for eight of 700 W is 0.8 at most; under load about half of that)."""


@dataclass(frozen=True)
class Budget:
    """A run over a number of tokens."""

    tokens: float
    goodput: Goodput
    days: float
    """Wall time, with failures."""
    kwh: float
    money: float | None
    """In the currency of the prices; None without prices."""


def budget_of(
    candidate: Candidate,
    tokens: float,
    *,
    gpu_hour_price: float | None = None,
    kwh_price: float | None = None,
    device_mtbf_h: float = DEVICE_MTBF_H,
) -> Budget:
    """Return what training on `tokens` takes. Prices: of one device for an hour, of one kWh."""
    cluster, run = candidate.cluster, candidate.run
    # 1. a save: each rank copies its share to the host, each node writes its own
    state_gb = n_params(run.model) * STATE_BYTES / 1e9
    stall_s = state_gb / run.ranks / HOST_COPY_GB_S
    save_s = state_gb / cluster.nodes / STORAGE_GB_S
    useful = goodput(cluster.gpus, stall_s, save_s=save_s, device_mtbf_h=device_mtbf_h)
    # 2. the wall time, and what follows from it
    days = tokens / candidate.tokens_s / 86_400 / useful.goodput if useful.goodput else float("inf")
    gpu_hours = days * 24 * cluster.gpus
    kwh = gpu_hours * cluster.device.watts / 1000 * (1 + NODE_SHARE_OF_POWER)
    prices = [(gpu_hour_price, gpu_hours), (kwh_price, kwh)]
    known = [price * amount for price, amount in prices if price is not None]
    return Budget(tokens, useful, days, kwh, sum(known) if known else None)
