"""The machine's physical memory as the engine's: one range for each key slot.

A frame that is reached through C = 0 and through C = 1 is two things to a core: lines
of two tags. So the engine sees two frames, `pa` and `slot << SLOT_SHIFT | pa`, each
over the line store of its slot. What a store of the guest changes is then at once
what the Python core, the walker and the caches see.

Devices and ROM answer through the bus, C-bit included; where nothing answers, all
ones are read, as on a real bus.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np

from ..machine import Machine
from ..memory import Region, RegionKind
from ..memory.memory_map import OpenBus
from ..types import PAGE_SHIFT, PAGE_SIZE
from .engine import Engine

SLOT_SHIFT = 44
"""Engine addresses have 52 bits: 16 TiB of RAM in each of 256 slots."""

NOWHERE = (1 << 52) - PAGE_SIZE
"""The engine's frame for physical addresses where nothing answers."""

ROM_BASE = 1 << 51
"""The engine's frames of ROM, for loads."""

ONES = (1 << 52) - 2 * PAGE_SIZE
"""The engine's frame of all ones, for loads where nothing answers."""

PERMISSION_MAP = (1 << 52) - 16 * PAGE_SIZE
"""VMCB and MSR permission map of the intercepts; no guest address leads there."""

VMCB_MSRPM = 0x48
"""Offset of the map's address in a VMCB. Source: [APM2] appendix B, table B-1."""


class NativeMemory:
    """Maps the machine's memory into an engine.

    Attributes:
        ram: page ranges [first, end) of RAM.
        unpopulated: stores to addresses where nothing answers.
        before_device, after_store: called around an access to a device.
        line_words: per slot, the valid and the dirty words of its pages.
    """

    def __init__(self, engine: Engine, machine: Machine) -> None:
        self.machine = machine
        self.unpopulated = 0
        self.ram = [
            (region.start >> PAGE_SHIFT, region.end >> PAGE_SHIFT)
            for region in machine.map.ram()
        ]
        self.before_device: Callable[[], object] = lambda: None
        self.after_store: Callable[[], object] = lambda: None
        self._engine = engine
        self._slots: set[int] = set()
        self.line_words: dict[int, tuple[memoryview, memoryview]] = {}
        self._copies: list[Any] = []
        self._show(ONES, b"\xff" * PAGE_SIZE)
        for region in machine.map.regions:
            if region.kind is RegionKind.ROM:
                self._show(ROM_BASE + region.start, region.rom)
        engine.map_device(NOWHERE, PAGE_SIZE, _read_ones, _write_nothing)

    def constant(self, pa: int) -> int | None:
        """Return the engine's frame for loads that always read the same, or None.

        ROM, and windows where no device answers: at memory speed. Stores go through
        the bus.
        """
        region = self.machine.map.find(pa)
        if region is None or isinstance(region.device, OpenBus):
            if region is not None and region.kind is RegionKind.ROM:
                return ROM_BASE + (pa & -PAGE_SIZE)
            return ONES
        return None

    def _show(self, address: int, data: bytes) -> None:
        """Map a copy of bytes that do not change."""
        copy = mmap.mmap(-1, len(data))
        copy.write(data)
        self._copies.append(copy)
        host = int(np.frombuffer(copy, np.uint8).ctypes.data)
        self._engine.map_memory(address, len(data), host)

    def add_slot(self, slot: int) -> None:
        """Map all memory under a key slot, if it is not yet; flushes the TLB."""
        if slot in self._slots:
            return
        self._slots.add(slot)
        base = slot << SLOT_SHIFT
        store = self.machine.caches.line_store(slot)
        self.line_words[slot] = store.valid_word, store.dirty_word
        host = store.data.cells.ctypes.data
        for region in self.machine.map.regions:
            size = region.end - region.start
            if region.kind is RegionKind.RAM:
                self._engine.map_memory(base + region.start, size, host + region.start)
            else:
                self._engine.map_device(
                    base + region.start, size, *self._callbacks(region, slot)
                )

    def _callbacks(self, region: Region, slot: int) -> tuple[Any, Any]:
        bus, start = self.machine.bus, region.start

        def read(_uc: Any, offset: int, size: int, _user: Any) -> int:
            self.before_device()
            data = bus.load(start + offset, size, slot)
            return int.from_bytes(data, "little")

        def write(_uc: Any, offset: int, size: int, value: int, _user: Any) -> None:
            mask = (1 << 8 * size) - 1
            self.before_device()
            bus.store(start + offset, (value & mask).to_bytes(size, "little"), slot)
            self.after_store()

        return read, write


def _read_ones(_uc: Any, _offset: int, size: int, _user: Any) -> int:
    return (1 << 8 * size) - 1


def _write_nothing(_uc: Any, _offset: int, _size: int, _value: int, _user: Any) -> None:
    return None
