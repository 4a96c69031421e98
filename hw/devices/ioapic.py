"""The I/O APIC: 24 inputs, each with an entry that says which vector it raises.

Source: Intel 82093AA data sheet (290566). One processor: destinations are not looked
at, lowest priority means fixed. The polarity bit reads back, inputs are asserted when
they are driven high. Version 11h has no EOI register.
"""

from __future__ import annotations

from typing import Any

from .lapic import FIXED, LOWEST_PRIORITY, LocalApic

BASE, SIZE = 0xFEC0_0000, 0x1000
INPUTS = 24
SELECT, WINDOW = 0x00, 0x10
ID, VERSION, ARBITRATION, TABLE = 0x00, 0x01, 0x02, 0x10
VERSION_VALUE = 0x11 | INPUTS - 1 << 16
TIMER_INPUT = 2
"""Where a PC's timer, IRQ 0, arrives."""

MASKED, LEVEL, REMOTE_IRR, PENDING = 1 << 16, 1 << 15, 1 << 14, 1 << 12
READ_ONLY = REMOTE_IRR | PENDING


class IoApic:
    """The chip.

    Args:
        apic: the local APIC that gets the vectors.
    """

    def __init__(self, apic: LocalApic) -> None:
        self._apic = apic
        self._select = 0
        self._id = 0
        self._entries = [MASKED for _ in range(INPUTS)]
        self._lines = 0
        apic.on_eoi = self.end_of_interrupt

    def set_irq(self, irq: int, high: bool) -> None:
        """Drive a PC's IRQ 0 to 15."""
        number = TIMER_INPUT if irq == 0 else irq
        if irq == TIMER_INPUT:
            return  # the cascade of the 8259s is no interrupt
        before = self._lines >> number & 1
        if high:
            self._lines |= 1 << number
        else:
            self._lines &= ~(1 << number)
        entry = self._entries[number]
        if entry & LEVEL:
            self._serve_level(number)
        elif high and not before and not entry & MASKED:
            self._deliver(entry)

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC is done with a vector: level inputs may ask again."""
        for number, entry in enumerate(self._entries):
            if entry & LEVEL and entry & 0xFF == vector and entry & REMOTE_IRR:
                self._entries[number] &= ~REMOTE_IRR
                self._serve_level(number)

    def read(self, offset: int, size: int) -> bytes:
        """Load from the register page."""
        value = 0
        if offset == SELECT:
            value = self._select
        elif offset == WINDOW:
            value = self._register(self._select)
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Store to the register page."""
        value = int.from_bytes(data[:4], "little")
        if offset == SELECT:
            self._select = value & 0xFF
        elif offset == WINDOW:
            self._set_register(self._select, value)

    def _register(self, index: int) -> int:
        if index in (ID, ARBITRATION):
            return self._id << 24
        if index == VERSION:
            return VERSION_VALUE
        number, high = divmod(index - TABLE, 2)
        if 0 <= number < INPUTS:
            return self._entries[number] >> 32 * high & 0xFFFF_FFFF
        return 0

    def _set_register(self, index: int, value: int) -> None:
        if index == ID:
            self._id = value >> 24 & 0xF
            return
        number, high = divmod(index - TABLE, 2)
        if not 0 <= number < INPUTS:
            return
        old = self._entries[number]
        if high:
            self._entries[number] = old & 0xFFFF_FFFF | (value & 0xFF00_0000) << 32
        else:
            kept = old & 0xFFFF_FFFF << 32
            if value & LEVEL:  # only there does remote IRR mean anything
                kept |= old & READ_ONLY
            self._entries[number] = kept | value & 0x1_FFFF & ~READ_ONLY
            self._serve_level(number)

    def _serve_level(self, number: int) -> None:
        entry = self._entries[number]
        blocked = entry & (MASKED | REMOTE_IRR)
        asks = entry & LEVEL and not blocked and self._lines >> number & 1
        if asks and self._deliver(entry):
            self._entries[number] |= REMOTE_IRR

    def _deliver(self, entry: int) -> bool:
        if entry >> 8 & 7 not in (FIXED, LOWEST_PRIORITY):
            return False
        return self._apic.request(entry & 0xFF, level=bool(entry & LEVEL))

    def state(self) -> dict[str, object]:
        """Return the state, for JSON."""
        return {
            "select": self._select,
            "id": self._id,
            "entries": list(self._entries),
            "lines": self._lines,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state` returned.

        Raises:
            KeyError, TypeError, ValueError: not what `state` returns.
        """
        entries = [int(entry) for entry in state["entries"]]
        if len(entries) != INPUTS:
            raise ValueError(f"{len(entries)} entries of an I/O APIC, not {INPUTS}")
        self._entries = entries
        self._select, self._id, self._lines = (
            int(state[key]) for key in ("select", "id", "lines")
        )
