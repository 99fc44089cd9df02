"""Devices as their makers publish them, and the time that counted work takes on one.

    seconds = Σ calls · max(operations / (PRODUCTS · peak), bytes / (BYTES · bandwidth), LAUNCH)

A roofline for each call. The three shares are those of a well-fed device, the same for all: what a program reaches of
them is measured, not published, so that ratios of times are better than times.
"""

from __future__ import annotations

from dataclasses import dataclass

from veneer.errors import ConfigError, nearest
from veneer.train.plan.count import Work

#: shares of the published peak that large products reach, of the bandwidth that passes over memory do, and of that of
#: the links between devices
PRODUCTS, BYTES, LINKS = 0.65, 0.8, 0.75
#: seconds that a call takes however small it is: the launch of a kernel
LAUNCH = 4e-6
#: bytes of a GPU that are never a program's: the driver's context, and workspaces of libraries
CONTEXT = 0.75 * 2**30
#: share of what a run holds that lies free between it, in the allocator's blocks
SLACK = 0.05


@dataclass(frozen=True)
class Hardware:
    """A device.

    Fields:
        memory: bytes.
        peak16, peak32: operations a second of dense products in 16 bits with sums in float32, and in float32.
        bandwidth: bytes a second of its memory.
        link: bytes a second that it sends to others of its machine (one direction).
        host: bytes a second that it reads from main memory.
        machine: devices that these links join.
        network: bytes a second that it sends to other machines.
        source: who says so.
    """

    name: str
    memory: float
    peak16: float
    peak32: float
    bandwidth: float
    link: float
    host: float
    machine: int
    network: float
    source: str

    @property
    def usable(self) -> float:
        return self.memory - CONTEXT

    def seconds(self, work: Work, itemsize: int = 2) -> float:
        """Of counted work, in products of this many bytes a number."""
        peak = (self.peak16 if itemsize < 4 else self.peak32) * PRODUCTS
        bandwidth = self.bandwidth * BYTES
        return sum(
            count * max(operations / peak, moved / bandwidth, LAUNCH) for (operations, moved), count in work.items()
        )

    def sending(self, sent: float, devices: int) -> float:
        """Seconds to send bytes, of a device among so many."""
        return sent / (LINKS * (self.link if devices <= self.machine else min(self.link, self.network)))


GB, TB, T = 1e9, 1e12, 1e12
#: NVLink and xGMI are published as the sum of both directions; PCIe of 16 lanes sends 32 (4.0) or 64 (5.0) GB/s. A
#: network is that of the makers' own reference machines: 400 Gbit/s a device, else 100 a machine.
PCIE4, PCIE5, NDR, ETHERNET = 32 * GB, 64 * GB, 50 * GB, 12.5 * GB
KNOWN = {
    one.name: one
    for one in (
        Hardware("l4", 24 * GB, 121 * T, 30.3 * T, 300 * GB, PCIE4, PCIE4, 8, ETHERNET, "NVIDIA, L4 datasheet"),
        Hardware("a10", 24 * GB, 125 * T, 31.2 * T, 600 * GB, PCIE4, PCIE4, 8, ETHERNET, "NVIDIA, A10 datasheet"),
        Hardware(
            "rtx3090", 24 * GB, 71 * T, 35.6 * T, 936 * GB, PCIE4, PCIE4, 4, ETHERNET, "NVIDIA, Ampere GA102 whitepaper"
        ),
        Hardware(
            "rtx4090", 24 * GB, 165.2 * T, 82.6 * T, 1008 * GB, PCIE4, PCIE4, 4, ETHERNET, "NVIDIA, Ada whitepaper"
        ),
        Hardware("l40s", 48 * GB, 362.05 * T, 91.6 * T, 864 * GB, PCIE4, PCIE4, 8, ETHERNET, "NVIDIA, L40S datasheet"),
        Hardware(
            "a100",
            80 * GB,
            312 * T,
            19.5 * T,
            2.039 * TB,
            300 * GB,
            PCIE4,
            8,
            25 * GB,
            "NVIDIA, A100 80GB SXM datasheet",
        ),
        Hardware("h100", 80 * GB, 989 * T, 67 * T, 3.35 * TB, 450 * GB, PCIE5, 8, NDR, "NVIDIA, H100 SXM datasheet"),
        Hardware("h200", 141 * GB, 989 * T, 67 * T, 4.8 * TB, 450 * GB, PCIE5, 8, NDR, "NVIDIA, H200 SXM datasheet"),
        Hardware("b200", 180 * GB, 2250 * T, 75 * T, 7.7 * TB, 900 * GB, PCIE5, 8, NDR, "NVIDIA, HGX B200 datasheet"),
        Hardware(
            "mi300x",
            192 * GB,
            1307.4 * T,
            163.4 * T,
            5.3 * TB,
            448 * GB,
            PCIE5,
            8,
            NDR,
            "AMD, Instinct MI300X datasheet",
        ),
    )
}


def hardware(name: str) -> Hardware:
    """A device by its name here. ``ConfigError``: an unknown one."""
    found = KNOWN.get(name.lower())
    if found is None:
        raise ConfigError(f"hardware {name!r}{nearest(name, KNOWN)}", f"one of {', '.join(KNOWN)}", "choose one")
    return found
