"""Time of collective operations and sends, by bytes, ranks and the links that they use.

Rings: an all-gather or reduce-scatter of X bytes over n ranks has n - 1 steps, of X / n bytes each;
an all-reduce is both. Times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from fgpt.plan.cluster import Cluster
from fgpt.plan.efficiency import Efficiency


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, `stride` ranks apart, and their links."""

    ranks: int
    bandwidth: float
    """Bytes/s that each rank can send, while the other groups of its node send too."""
    latency: float
    """Seconds of the steps of a ring, without the bytes."""

    @classmethod
    def of(cls, cluster: Cluster, efficiency: Efficiency, ranks: int, stride: int = 1) -> Group:
        in_node = ranks * stride <= cluster.gpus_per_node
        used = efficiency.link if in_node else efficiency.network
        bandwidth = cluster.bandwidth_gb_s(ranks, stride) * 1e9 * used
        # of a ring's n - 1 steps, those between nodes take longer
        nodes = 1 if in_node else min(-(-ranks * stride // cluster.gpus_per_node), ranks)
        steps = (ranks - nodes) * efficiency.link_us + (nodes - 1) * efficiency.network_us
        return cls(ranks, bandwidth, steps * 1e-6)

    def all_gather(self, n_bytes: float, messages: float = 1) -> float:
        """Of `n_bytes` after it, in so many messages. A reduce-scatter takes as long."""
        if self.ranks == 1:
            return 0.0
        share = (self.ranks - 1) / self.ranks
        return share * n_bytes / self.bandwidth + messages * self.latency

    def all_reduce(self, n_bytes: float, messages: float = 1) -> float:
        """Of `n_bytes` on each rank."""
        return 2 * self.all_gather(n_bytes, messages)

    def all_to_all(self, n_bytes: float) -> float:
        """Of `n_bytes` on each rank, of which it keeps one part in `ranks`."""
        return self.all_gather(n_bytes)


def send_time(
    cluster: Cluster, efficiency: Efficiency, n_bytes: float, distance: int, span: int
) -> float:
    """Of `n_bytes` to the rank `distance` ranks away, among `span` ranks that all send.

    If they are on several nodes, the sends that leave a node decide; that many ranks share its
    network.
    """
    link = cluster.device.link_gb_s * efficiency.link
    if span <= cluster.gpus_per_node:
        return n_bytes / (link * 1e9) + efficiency.link_us * 1e-6
    senders = min(distance, cluster.gpus_per_node)
    network = cluster.network_gbit_s / 8 / senders * efficiency.network
    return n_bytes / (min(network, link) * 1e9) + efficiency.network_us * 1e-6
