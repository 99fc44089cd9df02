"""Published figures of devices, the time of counted work on a device, and the time of transfers
within and between machines.

    seconds = Σ calls · max(operations / (PEAK_SHARE · peak), bytes / (BANDWIDTH_SHARE · bandwidth),
                            LAUNCH_SECONDS)

This formula applies the roofline model to each call of an operation. Real programs reach only a
share of the published rates. The three shares (``PEAK_SHARE``, ``BANDWIDTH_SHARE`` and
``LINK_SHARE``) are assumptions, the same for all devices. So ratios of the computed times are more
reliable than the times themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from veneer.errors import ConfigError, nearest
from veneer.train.plan.count import Work

#: The share of a published figure that programs are assumed to reach: of the peak rate in large
#: matrix products, of the memory bandwidth in operations that only move data, and of the bandwidth
#: of links between devices.
PEAK_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.65, 0.8, 0.75
#: the least time of a call, because the launch of its kernel takes that long
LAUNCH_SECONDS = 4e-6
#: bytes of a GPU's memory that tensors cannot use: the driver's context, workspaces of libraries
RESERVED_BYTES = 0.75 * 2**30
#: bytes that the allocator holds but cannot use (fragmentation), as a share of the bytes in use
FRAGMENTATION_SHARE = 0.05


class Network(NamedTuple):
    """The network between machines.

    Fields:
        bandwidth: bytes a second from one machine to others.
        source: the web address at which the bandwidth is published; None if it is an assumption.
    """

    bandwidth: float
    source: str | None


@dataclass(frozen=True)
class Hardware:
    """The published figures of a device.

    Fields:
        memory: size of its memory in bytes.
        peak16, peak32: floating-point operations a second of dense matrix products, in 16 bits with
            float32 accumulation, and in float32.
        memory_bandwidth: bytes a second that it reads from or writes to its memory.
        link_bandwidth: bytes a second to other devices of the same machine, in one direction.
        host_bandwidth: bytes a second that it reads from main memory.
        devices_per_machine: number of devices of a machine, between which ``link_bandwidth`` holds.
        network: the network between machines.
        source: the web address at which all figures except the network's are published.
    """

    name: str
    memory: float
    peak16: float
    peak32: float
    memory_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    devices_per_machine: int
    network: Network
    source: str

    @property
    def usable_memory(self) -> float:
        """Bytes of the memory that a program can use for tensors."""
        return self.memory - RESERVED_BYTES

    def seconds(self, work: Work, itemsize: int = 2) -> float:
        """Seconds that ``work`` takes if the elements of its matrices have ``itemsize`` bytes."""
        peak_rate = (self.peak16 if itemsize < 4 else self.peak32) * PEAK_SHARE
        bandwidth = self.memory_bandwidth * BANDWIDTH_SHARE
        return sum(
            count * max(operations / peak_rate, bytes_moved / bandwidth, LAUNCH_SECONDS)
            for (operations, bytes_moved, _), count in work.items()
        )

    def transfer_seconds(self, sent_bytes: float, device_count: int) -> float:
        """Seconds in which each of ``device_count`` devices sends ``sent_bytes``. If the devices
        are in several machines, the bandwidth is that of a whole machine: collectives run one ring
        for each network card, so the bytes of a device are divided among all cards."""
        return sent_bytes / (
            LINK_SHARE
            * (
                self.link_bandwidth
                if device_count <= self.devices_per_machine
                else min(self.link_bandwidth, self.network.bandwidth)
            )
        )


GB, TB, T = 1e9, 1e12, 1e12
#: Bytes a second of 16 lanes of PCIe 4.0 and 5.0 in one direction. NVLink and xGMI are published as
#: the sum of both directions, so the figures in `DEVICES` are half of the published ones.
PCIE4, PCIE5 = 32 * GB, 64 * GB

_NVIDIA_PDF = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf"
_HGX = "https://www.nvidia.com/en-us/data-center/hgx/"
_BASEPOD = "https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest/"
_DGX_A100 = "https://developer.nvidia.com/blog/defining-ai-innovation-with-dgx-a100/"
_VLLM_MORI = "https://rocm.docs.amd.com/en/latest/how-to/rocm-for-ai/inference/benchmark-docker/vllm-mori-distributed.html"
#: Networks by kind of machine. Machines that are sold with 8 devices have a network card of 400 or
#: 200 Gbit/s for each device. For devices that are sold singly, one card of 100 Gbit/s is assumed.
_DGX, _A100 = Network(400 * GB, f"{_BASEPOD}core-components.html"), Network(200 * GB, _DGX_A100)
_AMD, _OTHER = Network(400 * GB, _VLLM_MORI), Network(12.5 * GB, None)

#: Devices by name. The rates are those of dense products. Datasheets since Ampere also give twice
#: these rates "with sparsity", for weights of which half are zeros; do not enter those here.
DEVICES = {
    device.name: device
    for device in (
        Hardware(
            "l4", 24 * GB, 121 * T, 30.3 * T, 300 * GB, PCIE4, PCIE4, 8, _OTHER,
            "https://www.nvidia.com/en-us/data-center/l4/",
        ),
        Hardware(
            "a10", 24 * GB, 125 * T, 31.2 * T, 600 * GB, PCIE4, PCIE4, 8, _OTHER,
            f"{_NVIDIA_PDF}/a10/pdf/a10-datasheet.pdf",
        ),
        Hardware(
            "rtx3090", 24 * GB, 71 * T, 35.6 * T, 936 * GB, PCIE4, PCIE4, 4, _OTHER,
            "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
        ),
        Hardware("rtx4090", 24 * GB, 165.2 * T, 82.6 * T, 1008 * GB, PCIE4, PCIE4, 4, _OTHER, _ADA),
        Hardware(
            "l40s", 48 * GB, 362.05 * T, 91.6 * T, 864 * GB, PCIE4, PCIE4, 8, _OTHER,
            "https://www.nvidia.com/en-us/data-center/l40s/",
        ),
        Hardware(
            "a100", 80 * GB, 312 * T, 19.5 * T, 2.039 * TB, 300 * GB, PCIE4, 8, _A100,
            f"{_NVIDIA_PDF}/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
        ),
        Hardware(
            "h100", 80 * GB, 989 * T, 67 * T, 3.35 * TB, 450 * GB, PCIE5, 8, _DGX,
            "https://www.nvidia.com/en-us/data-center/h100/",
        ),
        Hardware(
            "h200", 141 * GB, 989 * T, 67 * T, 4.8 * TB, 450 * GB, PCIE5, 8, _DGX,
            "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446",
        ),
        # the memory bandwidth is computed: 7,680 bits, twice a cycle at 3,996 MHz, are 7.67 TB/s
        # (https://github.com/pytorch/ao/pull/4002)
        Hardware("b200", 180 * GB, 2250 * T, 75 * T, 7.7 * TB, 900 * GB, PCIE5, 8, _DGX, _HGX),
        Hardware(
            "mi300x", 192 * GB, 1307.4 * T, 163.4 * T, 5.3 * TB, 448 * GB, PCIE5, 8, _AMD,
            "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-"
            "sheet.pdf",
        ),
    )
}  # fmt: skip


def find_hardware(name: str) -> Hardware:
    """The device of this name, in upper or lower case. Raises ``ConfigError`` for an unknown
    name."""
    hardware = DEVICES.get(name.lower())
    if hardware is None:
        raise ConfigError(
            f"hardware {name!r}{nearest(name, DEVICES)}",
            f"one of {', '.join(DEVICES)}",
            "choose one",
        )
    return hardware
