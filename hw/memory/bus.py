"""Physical accesses of a core: RAM through the caches, ROM and devices directly."""

from __future__ import annotations

from ..arrays import Bytes
from ..errors import CbitError
from ..trace import Trace
from ..types import PhysAddr
from .cache import CacheHierarchy
from .controller import SLOT_NONE, MemoryController
from .hazard import slot_name
from .memory_map import MemoryMap, Region, RegionKind


class NothingThere(CbitError):
    """An access to physical addresses where neither memory nor a device answers.

    Attributes:
        pa: first address without an answer.
    """

    def __init__(self, pa: int, length: int, memory_map: MemoryMap) -> None:
        self.pa = PhysAddr(pa)
        super().__init__(
            f"physical address {pa:#x} ({length} bytes): no memory or device; "
            f"RAM ends at {memory_map.ram_end:#x}"
        )


class MemoryBus:
    """Routes physical accesses by the memory map.

    Attributes:
        map: who answers where.
        slot_for, page_view: the controller's and the caches'. A page has a view only
            while its lines are cached, and only lines of RAM ever are.
        mmio_encrypted: accesses to devices or ROM with C = 1, which encrypt nothing
            and are an error of the mapping.
    """

    def __init__(
        self,
        memory_map: MemoryMap,
        caches: CacheHierarchy,
        controller: MemoryController,
        trace: Trace,
    ) -> None:
        self.map = memory_map
        self.mmio_encrypted = 0
        self._caches = caches
        self._controller = controller
        self._trace = trace
        self.slot_for = controller.slot_for
        self.page_view = caches.page_view

    def load(self, pa: int, length: int, slot: int) -> bytes:
        """Return `length` bytes at `pa` as the tag `slot` sees them.

        Raises:
            NothingThere: outside the memory map.
        """
        region, run = self._route(pa, length)
        if run < length:
            return self.load(pa, run, slot) + self.load(pa + run, length - run, slot)
        if region.kind is RegionKind.RAM:
            return self._caches.claim(slot, pa, length).tobytes()
        self._note_encrypted_device(pa, length, slot, "load")
        offset = pa - region.start
        if region.kind is RegionKind.ROM:
            return region.rom[offset : offset + length]
        return region.device.read(offset, length)

    def store(self, pa: int, data: bytes | memoryview, slot: int) -> None:
        """Store `data` at `pa` under the tag `slot`; ROM ignores it.

        Raises:
            NothingThere: outside the memory map; nothing was stored there.
        """
        length = len(data)
        region, run = self._route(pa, length)
        if run < length:
            self.store(pa, data[:run], slot)
            self.store(pa + run, data[run:], slot)
            return
        if region.kind is RegionKind.RAM:
            view = self._caches.claim(slot, pa, length, write=True, overwrite=True)
            view.data[:] = data
            return
        self._note_encrypted_device(pa, length, slot, "store")
        if region.kind is RegionKind.MMIO:
            region.device.write(pa - region.start, bytes(data))

    def flush_line(self, pa: int, slot: int) -> None:
        """Write back and drop the line at `pa`; only RAM has lines."""
        region = self.map.find(pa)
        if region is not None and region.kind is RegionKind.RAM:
            self._caches.flush_line(slot, pa)

    def flush_page(self, pa: int, slot: int) -> None:
        """Write back and drop one tag's lines of a page; only RAM has lines."""
        region = self.map.find(pa)
        if region is not None and region.kind is RegionKind.RAM:
            self._caches.flush_page(slot, pa)

    def claim_ram(self, pa: int, length: int, slot: int) -> Bytes | None:
        """Return a live view for a store of every byte; None if it is not all RAM.

        Raises:
            NothingThere: outside the memory map.
        """
        if not self._all_ram(pa, length):
            return None
        return self._caches.claim(slot, pa, length, write=True, overwrite=True)

    def stream_ram(self, pa: int, length: int, slot: int) -> Bytes | None:
        """Return a live view for one read of every byte; None if it is not all RAM.

        Raises:
            NothingThere: outside the memory map.
        """
        if not self._all_ram(pa, length):
            return None
        return self._caches.stream(slot, pa, length)

    def _all_ram(self, pa: int, length: int) -> bool:
        region, run = self._route(pa, length)
        return region.kind is RegionKind.RAM and run == length

    def _route(self, pa: int, length: int) -> tuple[Region, int]:
        """Return the region at `pa` and how many of the bytes lie in it."""
        region = self.map.find(pa)
        if region is None:
            raise NothingThere(pa, length, self.map)
        return region, min(length, region.end - pa)

    def _note_encrypted_device(
        self, pa: int, length: int, slot: int, access: str
    ) -> None:
        if slot == SLOT_NONE or self._controller.transparent:
            return
        self.mmio_encrypted += 1
        if self._trace.active:
            self._trace.emit(
                "mmio-encrypted",
                pa=pa,
                length=length,
                access=access,
                through=slot_name(slot),
            )
