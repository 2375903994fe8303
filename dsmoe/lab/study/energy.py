"""Energy, where the host tells: Linux's powercap counters of its processors, and NVML's of NVIDIA devices.

What a counter sees is the whole processor or device, other programs on it included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pynvml

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Meter:
    """Counters that only grow; `joules` is what they grew by since the meter was made.

    Attributes:
        zones: folders of processors, each with `energy_uj` (microjoules, wraps) and `max_energy_range_uj`.
        devices: NVML handles.
    """

    zones: list[Path]
    devices: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sum, self._last = 0.0, self._read()

    def joules(self) -> float:
        """To be asked more often than a counter wraps: once a minute is plenty."""
        now = self._read()
        for before, after, wraps_at in zip(self._last, now, self._ranges(), strict=True):
            self._sum += after - before + (wraps_at if after < before else 0.0)
        self._last = now
        return self._sum

    def _read(self) -> list[float]:
        joules = [int((zone / "energy_uj").read_text()) / 1e6 for zone in self.zones]
        joules += [pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3 for device in self.devices]
        return joules

    def _ranges(self) -> list[float]:
        ranges = [int((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in self.zones]
        return ranges + [0.0] * len(self.devices)


def find_meter(powercap: Path = POWERCAP) -> Meter | None:
    """Of all processors and NVIDIA devices of this machine; None where nothing tells, or not to this user."""
    zones = []
    for zone in sorted(powercap.glob("*-rapl:*")):
        # intel-rapl:0 is a processor, intel-rapl:0:1 a part of it, and intel-rapl-mmio counts the same once more.
        if zone.name.count(":") == 1 and "mmio" not in zone.name and _readable(zone / "energy_uj"):
            zones.append(zone)
    devices = _nvidia()
    return Meter(zones, devices) if zones or devices else None


def _readable(path: Path) -> bool:
    try:
        return path.read_text().strip().isdigit()
    except OSError:  # since 2020 kernels tell root alone
        return False


def _nvidia() -> list:
    """Devices that count their energy, which those before Volta do not."""
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(place) for place in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # no driver
        return []
    return [device for device in devices if _counts_energy(device)]


def _counts_energy(device) -> bool:
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
    except pynvml.NVMLError:
        return False
    return True
