"""Devices that a run can be planned for. To add one: write the dataclass, add its line to `DEVICES`.

Speeds are the makers' (dense bfloat16 products); prices are those of a rented device, on demand, and change: the
option --price takes another.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

from limbeck.registry import Registry
from limbeck.runtime.memory import machine_memory
from limbeck.types import LimbeckError, short_repr

GIB = 2**30
# Devices of a fleet.
MOST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a plan knows of a device.

    Attributes:
        memory_gib: of one device, as its driver reports it.
        bandwidth_gb_s: of its memory.
        tflops: dense products in bfloat16; 0 where only a probe can tell.
        link_gb_s: to the other devices of a node, in each direction.
        per_node: devices of a usual node.
        usd_per_hour: of one device.
        host: whether it is the machine's own processor, whose processes share one memory.
    """

    memory_gib: float
    bandwidth_gb_s: float
    tflops: float
    link_gb_s: float
    per_node: int = 8
    usd_per_hour: float
    host: bool = False


@dataclass(frozen=True, kw_only=True)
class H100(Device):
    """NVIDIA H100 SXM, 80 GB."""

    memory_gib: float = 79.6
    bandwidth_gb_s: float = 3350
    tflops: float = 989
    link_gb_s: float = 450
    usd_per_hour: float = 2.99


@dataclass(frozen=True, kw_only=True)
class H200(Device):
    """NVIDIA H200 SXM, 141 GB."""

    memory_gib: float = 140.4
    bandwidth_gb_s: float = 4800
    tflops: float = 989
    link_gb_s: float = 450
    usd_per_hour: float = 3.79


@dataclass(frozen=True, kw_only=True)
class B200(Device):
    """NVIDIA B200, 180 GB."""

    memory_gib: float = 179.0
    bandwidth_gb_s: float = 8000
    tflops: float = 2250
    link_gb_s: float = 900
    usd_per_hour: float = 5.49


@dataclass(frozen=True, kw_only=True)
class A100(Device):
    """NVIDIA A100 SXM, 80 GB."""

    memory_gib: float = 79.3
    bandwidth_gb_s: float = 2039
    tflops: float = 312
    link_gb_s: float = 300
    usd_per_hour: float = 1.79


@dataclass(frozen=True, kw_only=True)
class A100Forty(Device):
    """NVIDIA A100 SXM, 40 GB."""

    memory_gib: float = 39.4
    bandwidth_gb_s: float = 1555
    tflops: float = 312
    link_gb_s: float = 300
    usd_per_hour: float = 1.29


@dataclass(frozen=True, kw_only=True)
class L40S(Device):
    """NVIDIA L40S, 48 GB, over PCIe."""

    memory_gib: float = 44.5
    bandwidth_gb_s: float = 864
    tflops: float = 362
    link_gb_s: float = 32
    usd_per_hour: float = 0.99


@dataclass(frozen=True, kw_only=True)
class A10G(Device):
    """NVIDIA A10G, 24 GB, over PCIe."""

    memory_gib: float = 22.0
    bandwidth_gb_s: float = 600
    tflops: float = 70
    link_gb_s: float = 32
    usd_per_hour: float = 1.01


@dataclass(frozen=True, kw_only=True)
class L4(Device):
    """NVIDIA L4, 24 GB, over PCIe."""

    memory_gib: float = 22.0
    bandwidth_gb_s: float = 300
    tflops: float = 121
    link_gb_s: float = 32
    usd_per_hour: float = 0.71


@dataclass(frozen=True, kw_only=True)
class RTX4090(Device):
    """NVIDIA GeForce RTX 4090, 24 GB, over PCIe."""

    memory_gib: float = 23.5
    bandwidth_gb_s: float = 1008
    tflops: float = 165
    link_gb_s: float = 32
    usd_per_hour: float = 0.44


@dataclass(frozen=True, kw_only=True)
class MI300X(Device):
    """AMD Instinct MI300X, 192 GB."""

    memory_gib: float = 191.5
    bandwidth_gb_s: float = 5300
    tflops: float = 1307
    link_gb_s: float = 448
    usd_per_hour: float = 2.99


@dataclass(frozen=True, kw_only=True)
class Cpu(Device):
    """The processor of this machine: its own memory, a speed that a probe measures."""

    memory_gib: float = field(default_factory=lambda: machine_memory() / GIB)
    bandwidth_gb_s: float = 0.0
    tflops: float = 0.0
    link_gb_s: float = 0.0
    per_node: int = 1
    usd_per_hour: float = 0.0
    host: bool = True


DEVICES: Registry[Device] = Registry(
    "device",
    {
        "cpu": Cpu,
        "H100": H100,
        "H200": H200,
        "B200": B200,
        "A100": A100,
        "A100-40GB": A100Forty,
        "L40S": L40S,
        "A10G": A10G,
        "L4": L4,
        "RTX4090": RTX4090,
        "MI300X": MI300X,
    },
    entry_points="limbeck.devices",
)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Devices of one kind that a run is planned for, a rank each."""

    name: str
    count: int
    device: Device

    @property
    def nodes(self) -> int:
        return -(-self.count // self.device.per_node)

    @property
    def memory(self) -> int:
        """Bytes that a rank can have: a processor's memory is shared by all ranks."""
        whole = int(self.device.memory_gib * GIB)
        return whole // self.count if self.device.host else whole

    def usd(self, hours: float) -> float:
        return hours * self.count * self.device.usd_per_hour

    def __str__(self) -> str:
        return f"{self.count}x{self.name}"


def fleet_of(text: str, *, usd_per_hour: float | None = None) -> Fleet:
    """The devices of a text such as 8xH100, or H100 for one.

    Args:
        usd_per_hour: another price of one device.

    Raises:
        LimbeckError: no such text or price, or an unknown device; names the nearest known one.
    """
    if usd_per_hour is not None and not 0 <= usd_per_hour < math.inf:
        raise LimbeckError(f"--price is {usd_per_hour}; expected dollars per hour of one device, such as 2.5")
    match = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?(\S+)", text.strip())
    digits = "0" if match is None else match[1] or "1"
    # Python reads no number of thousands of digits.
    count = int(digits) if len(digits) <= len(str(MOST)) else 0
    if match is None or not 1 <= count <= MOST:
        raise LimbeckError(
            f"--devices is {short_repr(text)}; expected a number of devices and their name, such as 8xH100, the number "
            f"from 1 to {MOST:,}"
        )
    known = {name.lower(): name for name in DEVICES}
    name = known.get(match[2].lower(), match[2])
    DEVICES.require(name)
    device = DEVICES.build(name)
    if usd_per_hour is not None:
        device = replace(device, usd_per_hour=usd_per_hour)
    return Fleet(name=name, count=count, device=device)
