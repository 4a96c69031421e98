"""Who answers at a physical address: RAM, ROM, or a device.

The layout is a PC's: RAM below 640 KiB, the VGA window, the BIOS ROM, RAM from
1 MiB, the PCI hole below 4 GiB, and the rest of RAM above 4 GiB.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from ..errors import CallerError
from ..types import PAGE_SIZE, PhysAddr

LOW_RAM_END = 0xA_0000
ROM_START = 0xF_0000
HIGH_RAM_START = 0x10_0000
PCI_HOLE_START = 0xC000_0000
PCI_HOLE_END = 0x1_0000_0000


class RegionKind(Enum):
    """What stands behind an address."""

    RAM = "ram"
    ROM = "rom"
    MMIO = "mmio"


class Mmio(Protocol):
    """A device's register window; offsets count from the region's start."""

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`."""

    def write(self, offset: int, data: bytes) -> None:
        """Take `data` at `offset`."""


class OpenBus:
    """A window where no device answers: all ones are read, writes vanish."""

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes of all ones."""
        return b"\xff" * size

    def write(self, offset: int, data: bytes) -> None:
        """Drop `data`."""


@dataclass(frozen=True)
class Region:
    """Half-open physical range [start, end) with one kind.

    `rom` holds the bytes of a ROM, `device` answers for MMIO.
    """

    start: PhysAddr
    end: PhysAddr
    kind: RegionKind
    rom: bytes = b""
    device: Mmio = field(default_factory=OpenBus)


class MemoryMap:
    """Sorted, disjoint regions."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: region.start)
        self._starts = [region.start for region in self.regions]
        for below, above in zip(self.regions, self.regions[1:], strict=False):
            if below.end > above.start:
                raise CallerError(
                    f"memory map: {above.kind.value} at {above.start:#x} overlaps "
                    f"{below.kind.value} [{below.start:#x}, {below.end:#x})"
                )

    @classmethod
    def pc(cls, ram_bytes: int, rom: bytes = b"\xff" * 0x1_0000) -> MemoryMap:
        """Return a PC's map with `ram_bytes` of RAM in all.

        Args:
            ram_bytes: a multiple of 4096, 2 MiB or more. The 384 KiB below 1 MiB
                that the VGA window and the ROM hide are lost, as on a PC.
            rom: 64 KiB shown at F_0000.

        Raises:
            CallerError: the size is too small or no multiple of a page, or the ROM
                does not fill its window.
        """
        if ram_bytes % PAGE_SIZE or ram_bytes < 2 << 20:
            raise CallerError(
                f"RAM of {ram_bytes:#x} bytes: 2 MiB or more, "
                "a multiple of 4096 expected"
            )
        if len(rom) != HIGH_RAM_START - ROM_START:
            raise CallerError(
                f"ROM of {len(rom):#x} bytes: {HIGH_RAM_START - ROM_START:#x} expected"
            )
        low_top = min(ram_bytes, PCI_HOLE_START)
        mmio, ram = RegionKind.MMIO, RegionKind.RAM
        regions = [
            Region(PhysAddr(0), PhysAddr(LOW_RAM_END), ram),
            Region(PhysAddr(LOW_RAM_END), PhysAddr(ROM_START), mmio),
            Region(PhysAddr(ROM_START), PhysAddr(HIGH_RAM_START), RegionKind.ROM, rom),
            Region(PhysAddr(HIGH_RAM_START), PhysAddr(low_top), ram),
            Region(PhysAddr(PCI_HOLE_START), PhysAddr(PCI_HOLE_END), mmio),
        ]
        if ram_bytes > low_top:
            high_top = PCI_HOLE_END + ram_bytes - low_top
            regions.append(Region(PhysAddr(PCI_HOLE_END), PhysAddr(high_top), ram))
        return cls(regions)

    def attach(self, start: int, size: int, device: Mmio) -> None:
        """Put a device's registers into the region of devices around them.

        Raises:
            CallerError: the range does not lie in one window without a device.
        """
        region = self.find(start)
        if (
            region is None
            or region.kind is not RegionKind.MMIO
            or not isinstance(region.device, OpenBus)
            or start + size > region.end
        ):
            raise CallerError(
                f"no room for device registers [{start:#x}, {start + size:#x}): "
                "expected inside a window where nothing answers"
            )
        at = self.regions.index(region)
        parts = [
            replace(region, end=PhysAddr(start)),
            Region(PhysAddr(start), PhysAddr(start + size), region.kind, device=device),
            replace(region, start=PhysAddr(start + size)),
        ]
        self.regions[at : at + 1] = [part for part in parts if part.start < part.end]
        self._starts = [part.start for part in self.regions]

    def find(self, pa: int) -> Region | None:
        """Return the region that holds `pa`, or None."""
        index = bisect_right(self._starts, pa) - 1
        if index < 0 or pa >= self.regions[index].end:
            return None
        return self.regions[index]

    def ram(self) -> list[Region]:
        """Return the RAM regions, lowest first."""
        return [r for r in self.regions if r.kind is RegionKind.RAM]

    @property
    def ram_end(self) -> PhysAddr:
        """One past the highest RAM byte: the length of DRAM and line stores."""
        return self.ram()[-1].end

    @property
    def ram_bytes(self) -> int:
        """How much RAM there is, holes left out."""
        return sum(region.end - region.start for region in self.ram())
