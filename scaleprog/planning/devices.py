"""What a device can do on paper, and how long its collectives take, by latency and bandwidth on rings and trees."""

import difflib
import math
from dataclasses import dataclass
from typing import Literal

from scaleprog.errors import RecipeError
from scaleprog.recipe.keys import Precision

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class Device:
    """One rank's device and its links.

    Args:
        name: of the device.
        sources: where the figures come from, for people.
        bf16_flops, fp32_flops: peak FLOP/s without sparsity.
        memory: bytes.
        memory_bandwidth: bytes/s.
        intra_bandwidth: of the links inside a node, in bytes/s in one direction.
        inter_bandwidth: this rank's share of its node's network, in bytes/s in one direction.
        intra_latency, inter_latency: of one hop inside a node or between nodes, in seconds.
        ranks_per_node: ranks on each node.
        watts: thermal design power, from the same data sheets.
        achieved: the fraction of peak FLOP/s that forward and backward are assumed to reach.
    """

    name: str
    sources: str
    bf16_flops: float
    fp32_flops: float
    memory: float
    memory_bandwidth: float
    intra_bandwidth: float
    inter_bandwidth: float
    intra_latency: float
    inter_latency: float
    ranks_per_node: int
    watts: float
    achieved: float

    def flops(self, precision: Precision) -> float:
        """Peak FLOP/s of matrix products in a precision."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops

    @classmethod
    def named(cls, name: str, option: str = "--device") -> "Device":
        """The device of this name in `DEVICES`, as given to `option`. Raises RecipeError if there is none."""
        if name not in DEVICES:
            near = difflib.get_close_matches(name, DEVICES, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise RecipeError(f"{option}: unknown device {name!r}; {hint}known devices: {', '.join(DEVICES)}")
        return DEVICES[name]


NCCL_HOP = {"intra_latency": 1.9e-6, "inter_latency": 4.0e-6}
"""Seconds, from NCCL's src/graph/tuning.cc: hwLat of ring and LL128, for NVLINK and NET."""

DEVICES = {
    device.name: device
    for device in (
        Device(
            "h100",
            "NVIDIA H100 SXM data sheet (989 TFLOP/s bf16, 67 fp32, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways); "
            "DGX H100: 8 GPUs, one 400 Gb/s adapter each",
            989e12,
            67e12,
            80e9,
            3.35e12,
            450e9,
            50e9,
            **NCCL_HOP,
            ranks_per_node=8,
            watts=700,
            achieved=0.4,
        ),
        Device(
            "a100",
            "NVIDIA A100 80GB SXM data sheet (312 TFLOP/s bf16, 19.5 fp32, 80 GB at 2.04 TB/s, NVLink 600 GB/s both "
            "ways); DGX A100: 8 GPUs, one 200 Gb/s adapter each",
            312e12,
            19.5e12,
            80e9,
            2.04e12,
            300e9,
            25e9,
            **NCCL_HOP,
            ranks_per_node=8,
            watts=400,
            achieved=0.4,
        ),
        Device(
            "cpu",
            "one socket of two, Intel Xeon Platinum 8480+ (56 cores at 2.0 GHz, 64 fp32 FLOP a cycle by AVX-512, 1024 "
            "bf16 by AMX, 8 channels of DDR5-4800, 4 UPI links of 16 GT/s); 256 GB and 100 Gb/s a node are assumed",
            56 * 2.0e9 * 1024,
            56 * 2.0e9 * 64,
            256e9,
            8 * 38.4e9,
            4 * 32e9,
            12.5e9 / 2,
            intra_latency=5e-6,
            inter_latency=3e-5,
            ranks_per_node=2,
            watts=350,
            achieved=0.4,
        ),
    )
}
"""Devices by name. Assumed are `achieved` and, for `cpu`, the latencies, the size of the memory, and the network."""


@dataclass(frozen=True)
class Collective:
    """Equal collectives of one step.

    Args:
        kind: of the collectives.
        size: bytes of the whole tensor, including padding.
        ranks: how many ranks take part in each.
        count: how many collectives there are.
        spacing: the difference between the numbers of neighboring ranks.
        exposed: whether no computation overlaps with them.
    """

    kind: Kind
    size: float
    ranks: int
    count: int = 1
    spacing: int = 1
    exposed: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in all collectives, on a ring: (n - 1) / n of the tensor, twice for an all-reduce."""
        return self.count * self._rounds * self.size * (self.ranks - 1) / self.ranks

    def between_nodes(self, device: Device) -> float:
        """The bytes of `sent` that leave the node: a ring leaves each of its nodes once."""
        together = self._together(device)
        return self.sent / together if self.ranks > together else 0.0

    def seconds(self, device: Device) -> float:
        """Seconds for all collectives, one after another, on a ring; an all-reduce uses a tree if that is faster."""
        if self.ranks == 1:
            return 0.0
        together, nodes = self._together(device), self._nodes(device)
        inter = self.between_nodes(device) / device.inter_bandwidth
        intra = (self.sent - self.between_nodes(device)) / device.intra_bandwidth
        between = min(nodes, self.ranks - 1) if nodes > 1 else 0
        hops = (self.ranks - 1 - between) * device.intra_latency + between * device.inter_latency
        latency = self._rounds * hops
        if self.kind == "all_reduce":
            depth = math.ceil(math.log2(nodes)) * device.inter_latency + (together - 1) * device.intra_latency
            latency = min(latency, 2 * depth)
        return max(inter, intra) + self.count * latency

    @property
    def _rounds(self) -> int:
        return 2 if self.kind == "all_reduce" else 1

    def _together(self, device: Device) -> int:
        """Ranks of a group that share a node."""
        return min(self.ranks, max(1, device.ranks_per_node // self.spacing))

    def _nodes(self, device: Device) -> int:
        return math.ceil(self.ranks / self._together(device))


PEAKS = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
"""Peak bf16 FLOP/s without sparsity, by the name that torch gives a device; from NVIDIA's data sheet of each, which for
GH200, H100, H200 and L4 names the peak with sparsity, twice as much."""
