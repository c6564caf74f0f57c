"""Every rate and latency that the predictions use: measured, published or assumed, and where each is from.

Collectives are timed as NCCL's planner times them: for each algorithm and protocol a latency and a share of the link's
rate, of which the fastest is taken. These are NCCL's own constants (NVIDIA/nccl, src/graph/tuning.cc at 5067397c, June
2026), which no run of this project has confirmed. Left out: reductions inside switches (SHARP), which would make
all-reduces of hundreds of megabytes faster; NCCL's corrections for trees; and the launch of kernels.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER = "all-gather", "all-reduce", "reduce-scatter"

# Measured on one H100 (benchmarks/results/nvidia-h100-80gb-hbm3). A plain copy: 2026-11-27-517d1bb-linear.json,
# "bandwidth". Three products of 8192 x 4096 x 128256: torch linear there, less torch's cross entropy at the same shape
# in 2026-11-27-517d1bb.json, which is not of the same minute.
H100_COPY = 3.02e12  # bytes per second
H100_PRODUCTS = 3 * 2 * 8192 * 4096 * 128256 / (40.2e-3 - 6.23e-3)  # floating-point operations per second
# Published peaks (NVIDIA's data sheets): HBM in bytes per second, dense bfloat16 in operations per second.
H100_PEAK, H200_PEAK, B200_PEAK = 3.35e12, 4.8e12, 8.0e12
HOPPER_FLOPS, BLACKWELL_FLOPS = 989e12, 2250e12
# Assumed: the others reach the share of their peaks that the H100 reached.
COPY_SHARE = H100_COPY / H100_PEAK
PRODUCT_SHARE = H100_PRODUCTS / HOPPER_FLOPS
# Bytes per second one way: 18 links at the rate that NCCL plans with (src/graph/topo.h, SM90_NVLINK_BW and
# SM100_NVLINK_BW). The data sheets' 900 GB/s and 1.8 TB/s count both ways and are 450 and 900 GB/s one way.
NVLINK_4, NVLINK_5 = 18 * 20.6e9, 18 * 40.1e9
# One 400 Gb/s adapter (InfiniBand NDR, 50 GB/s) for each GPU; "46-48 GB/s per NIC" is what NCCL's developers expect to
# be measured (NVIDIA/nccl-tests, issue 290).
INFINIBAND = 47e9
GPUS_OF_A_NODE = 8  # HGX H100, H200 and B200


class Device(NamedTuple):
    name: str
    memory_rate: float  # bytes per second, read and written together
    product_rate: float  # bfloat16 operations per second
    nvlink_rate: float  # bytes per second, one way
    low_latency_rate: float  # bytes per second that the protocol LL reaches over NVLink


DEVICES = (
    Device("H100", H100_COPY, H100_PRODUCTS, NVLINK_4, 141e9),
    Device("H200", COPY_SHARE * H200_PEAK, H100_PRODUCTS, NVLINK_4, 141e9),
    Device("B200", COPY_SHARE * B200_PEAK, PRODUCT_SHARE * BLACKWELL_FLOPS, NVLINK_5, 282e9),
)


class Fabric(NamedTuple):
    """How the ranks of a group are connected: by NVLink inside nodes of `local` GPUs, by InfiniBand beyond."""

    name: str
    local: int  # ranks of the group in one node

    def nodes(self, ranks: int) -> int:
        return -(-ranks // self.local)


FABRICS = (Fabric("nodes of 8", GPUS_OF_A_NODE), Fabric("one GPU a node", 1))


class Protocol(NamedTuple):
    """One way in which NCCL sends: latencies in microseconds, and the share of the link's rate that it reaches."""

    base: float
    nvlink_hop: float
    network_hop: float
    share: float
    low_latency: bool = False  # LL: its rate has a bound of its own
    overhead: float = 1.0  # what a hop inside a node takes at least where the ring spans several


RING = (
    Protocol(6.6, 0.6, 2.7, 0.5, low_latency=True),
    Protocol(14.0, 1.9, 4.0, 0.92),
    Protocol(8.4, 3.4, 14.0, 1.0, overhead=3.0),
)
TREE = (
    Protocol(6.8, 0.6, 5.0, 0.92 / 3.8, low_latency=True),
    Protocol(14.0, 1.25, 8.5, 0.92 * 120 / 128),
    Protocol(8.4, 4.0, 14.0, 0.92),
)
# Parallel aggregated trees, for all-gather and reduce-scatter where each GPU is in a node of its own.
PAT = Protocol(8.0, 0.0, 14.0 / 3.5, 0.75)
PAT_PER_RANK = 2.8  # microseconds
LOW_LATENCY_RATES = (39e9, 20.4e9)  # bytes per second of LL over two nodes, and over more, with Intel's processors


class Collective(NamedTuple):
    """One call on every rank of the group.

    Attributes:
        payload: bytes that each rank hands over; for a reduce-scatter the whole tensor, of which it gets back a part.
        behind: floating-point operations of a product that this rank computes meanwhile.
        count: how often.
    """

    kind: str
    payload: int
    behind: int = 0
    count: int = 1


def sent_bytes(collective: Collective, ranks: int) -> float:
    """By each rank, as a ring sends: what NCCL's tests count (NVIDIA/nccl-tests, doc/PERFORMANCE.md)."""
    factor = {
        ALL_GATHER: ranks - 1.0,
        ALL_REDUCE: 2 * (ranks - 1) / ranks,
        REDUCE_SCATTER: (ranks - 1) / ranks,
    }[collective.kind]
    return collective.count * factor * collective.payload


def link_rate(ranks: int, device: Device, fabric: Fabric) -> float:
    """Bytes per second at which a ring's slowest link sends: a node's adapters work at once, each for its own ring."""
    if fabric.nodes(ranks) == 1:
        return device.nvlink_rate
    network = fabric.local * INFINIBAND
    return network if fabric.local == 1 else min(device.nvlink_rate, network)


def collective_seconds(collective: Collective, ranks: int, device: Device, fabric: Fabric) -> float:
    """Of all its calls, with nothing hidden behind them."""
    if ranks == 1:
        return 0.0
    single = collective._replace(count=1)
    return collective.count * min(_candidates(single, ranks, device, fabric))


def _candidates(collective: Collective, ranks: int, device: Device, fabric: Fabric) -> Iterator[float]:
    """Seconds by each algorithm and protocol."""
    nodes = fabric.nodes(ranks)
    local = min(ranks, fabric.local)
    sent = sent_bytes(collective, ranks)

    def rate(protocol: Protocol) -> float:
        reached = protocol.share * link_rate(ranks, device, fabric)
        if not protocol.low_latency:
            return reached
        return min(reached, device.low_latency_rate if nodes == 1 else LOW_LATENCY_RATES[nodes > 2])

    rounds = 2 if collective.kind == ALL_REDUCE else 1
    for protocol, of_a_tree in zip(RING, TREE, strict=True):
        # A ring of one GPU a node shows its network latencies whole: NCCL counts those of a tree.
        network_hop = of_a_tree.network_hop if local == 1 else protocol.network_hop
        nvlink_hop = protocol.nvlink_hop if nodes == 1 else max(protocol.nvlink_hop, protocol.overhead)
        hops = (ranks - nodes) * nvlink_hop + (nodes - 1) * network_hop
        yield (protocol.base + rounds * hops) * 1e-6 + sent / rate(protocol)
    if collective.kind == ALL_REDUCE:
        for protocol in TREE:
            hops = (local - 1) * protocol.nvlink_hop + math.floor(math.log2(nodes)) * protocol.network_hop
            yield (protocol.base + 2 * hops) * 1e-6 + 2 * collective.payload / rate(protocol)
    elif local == 1:
        hops = math.floor(math.log2(nodes)) * PAT.network_hop + ranks * PAT_PER_RANK
        total = collective.payload * (ranks if collective.kind == ALL_GATHER else 1)
        yield (PAT.base + hops) * 1e-6 + total / rate(PAT)
