"""The local APIC of the boot core: registers, priorities, the timer, LINT0.

xAPIC at FEE0_0000. The timer counts an invented bus clock of 100 MHz. The other cores'
interrupts (INIT, SIPI) have nobody to go to.

Source: [APM2] chapter 16 (Advanced Programmable Interrupt Controller); that the error
register has to be written before it is read: Intel SDM volume 3, 10.5.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .clock import VirtualClock
from .pic import Pic

BASE = 0xFEE0_0000
SIZE = 0x1000
BUS_HZ = 100_000_000
NANOSECONDS = 1_000_000_000
VERSION = 0x0005_0010
"""Version 10h, six local vectors, no extended space."""

ID, VERSION_REGISTER, TPR, PPR, EOI = 0x02, 0x03, 0x08, 0x0A, 0x0B
LDR, DFR, SVR, ISR, TMR, IRR = 0x0D, 0x0E, 0x0F, 0x10, 0x18, 0x20
ESR, ICR_LOW, ICR_HIGH = 0x28, 0x30, 0x31
LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR = range(0x32, 0x38)
INITIAL_COUNT, CURRENT_COUNT, DIVIDE = 0x38, 0x39, 0x3E

MASKED = 1 << 16
PERIODIC = 1 << 17
SOFTWARE_ENABLE = 1 << 8
FIXED, LOWEST_PRIORITY, DELIVERY_EXTINT = 0, 1, 7
LOGICAL_DESTINATION = 1 << 11
BROADCAST = 0xFF
SELF, ALL = 1, 2
LVT_WRITABLE = {
    LVT_TIMER: 0x300FF,
    LVT_THERMAL: 0x107FF,
    LVT_PERF: 0x107FF,
    LVT_LINT0: 0x1A7FF,
    LVT_LINT1: 0x1A7FF,
    LVT_ERROR: 0x100FF,
}
SENT_ILLEGAL_VECTOR, RECEIVED_ILLEGAL_VECTOR = 1 << 5, 1 << 6


class LocalApic:
    """One local APIC.

    Args:
        clock: the machine's time.
        pic: passed through by LINT0 in ExtINT mode.
        changed: called when an interrupt may have become deliverable.

    Attributes:
        on_eoi: called with each level-triggered vector that software is done with.
    """

    def __init__(
        self, clock: VirtualClock, pic: Pic, changed: Callable[[], None]
    ) -> None:
        self._clock = clock
        self._pic = pic
        self._changed = changed
        self.on_eoi: Callable[[int], None] = lambda vector: None
        self._registers = {
            ID: 0,
            TPR: 0,
            LDR: 0,
            DFR: 0xFFFF_FFFF,
            SVR: SOFTWARE_ENABLE | 0xFF,
            ESR: 0,
            ICR_LOW: 0,
            ICR_HIGH: 0,
            INITIAL_COUNT: 0,
            DIVIDE: 0,
            **dict.fromkeys(LVT_WRITABLE, MASKED),
        }
        # After firmware: virtual wire, as boot loaders hand it over.
        self._registers[LVT_LINT0] = DELIVERY_EXTINT << 8
        self._isr = self._irr = self._tmr = 0
        self._errors = 0  # since the ESR was written
        self._started: int | None = None
        self._timer = clock.timer(self._expired)

    @property
    def software_enabled(self) -> bool:
        """SVR[8]."""
        return bool(self._registers[SVR] & SOFTWARE_ENABLE)

    # What the core asks

    @property
    def pending(self) -> bool:
        """An interrupt can be delivered, by priority or from the 8259."""
        return self._best() is not None or (self._passes_pic() and self._pic.pending)

    def acknowledge(self) -> int:
        """Take the interrupt; return its vector."""
        best = self._best()
        if best is None:
            if self._passes_pic() and self._pic.pending:
                return self._pic.acknowledge()
            return self._registers[SVR] & 0xFF
        self._irr &= ~(1 << best)
        self._isr |= 1 << best
        return best

    def _passes_pic(self) -> bool:
        lint0 = self._registers[LVT_LINT0]
        return not lint0 & MASKED and lint0 >> 8 & 7 == DELIVERY_EXTINT

    def _best(self) -> int | None:
        if not self._irr or not self.software_enabled:
            return None
        best = self._irr.bit_length() - 1
        return best if best >> 4 > self._processor_priority() >> 4 else None

    def _processor_priority(self) -> int:
        task = self._registers[TPR]
        serving = self._isr.bit_length() - 1 if self._isr else 0
        return task if task >> 4 >= serving >> 4 else serving & 0xF0

    # Registers

    def read(self, offset: int, size: int) -> bytes:
        """Load from the register page."""
        value = self.read_register(offset >> 4) >> 8 * (offset & 3)
        if offset & 0xC:
            value = 0
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Store to the register page: aligned 32-bit stores count."""
        if not offset & 0xF and len(data) >= 4:
            self.write_register(offset >> 4, int.from_bytes(data[:4], "little"))

    def read_register(self, index: int) -> int:
        """Return a register by offset / 16, as x2APIC numbers them too."""
        if index == VERSION_REGISTER:
            return VERSION
        if index == PPR:
            return self._processor_priority()
        if index == CURRENT_COUNT:
            return self._current_count()
        for base, bits in ((ISR, self._isr), (TMR, self._tmr), (IRR, self._irr)):
            if base <= index < base + 8:
                return bits >> 32 * (index - base) & 0xFFFF_FFFF
        return self._registers.get(index, 0)

    def write_register(self, index: int, value: int) -> None:
        """Set a register by offset / 16; read-only ones ignore it."""
        if index == EOI:
            if self._isr:
                vector = self._isr.bit_length() - 1
                self._isr &= ~(1 << vector)
                if self._tmr >> vector & 1:
                    self.on_eoi(vector)
        elif index in LVT_WRITABLE:
            if not self.software_enabled:
                value |= MASKED
            self._registers[index] = value & LVT_WRITABLE[index]
            if index == LVT_TIMER:
                self._schedule()
        elif index == SVR:
            self._registers[SVR] = value & 0x3FF
            if not self.software_enabled:
                for lvt in LVT_WRITABLE:
                    self._registers[lvt] |= MASKED
        elif index == ICR_LOW:
            self._registers[ICR_LOW] = value & 0xCDFFF & ~(1 << 12)
            self._send(value)
        elif index == INITIAL_COUNT:
            self._registers[INITIAL_COUNT] = value
            self._started = self._clock.now if value else None
            self._schedule()
        elif index == DIVIDE:
            self._set_divide(value)
        elif index == ESR:
            self._registers[ESR], self._errors = self._errors, 0
        elif index == TPR:
            self._registers[TPR] = value & 0xFF
        elif index in (LDR, ICR_HIGH, ID):
            self._registers[index] = value & 0xFF00_0000
        elif index == DFR:
            self._registers[DFR] = value | 0x0FFF_FFFF
        self._update()

    def request(self, vector: int, *, level: bool = False) -> bool:
        """Let a vector become pending; tell whether it was accepted."""
        if not self.software_enabled:
            return False
        if vector < 16:
            self._error(RECEIVED_ILLEGAL_VECTOR)
            return False
        self._irr |= 1 << vector
        self._tmr = self._tmr & ~(1 << vector) | level << vector
        self._update()
        return True

    def _error(self, bit: int) -> None:
        self._errors |= bit
        entry = self._registers[LVT_ERROR]
        if not entry & MASKED and entry & 0xFF >= 16:
            self.request(entry & 0xFF)

    def _send(self, command: int) -> None:
        shorthand, mode = command >> 18 & 3, command >> 8 & 7
        to_self = shorthand in (SELF, ALL) or (
            shorthand == 0 and self._is_addressed(bool(command & LOGICAL_DESTINATION))
        )
        if mode not in (FIXED, LOWEST_PRIORITY):
            return
        if command & 0xFF < 16:
            self._error(SENT_ILLEGAL_VECTOR)
        elif to_self:
            self.request(command & 0xFF)

    def _is_addressed(self, logical: bool) -> bool:
        destination = self._registers[ICR_HIGH] >> 24
        if destination == BROADCAST:
            return True
        if not logical:
            return destination == self._registers[ID] >> 24
        own = self._registers[LDR] >> 24
        if self._registers[DFR] >> 28 == 0xF:  # flat: a bit for each core
            return bool(destination & own)
        return destination >> 4 == own >> 4 and bool(destination & own & 0xF)

    # The timer

    def _divisor(self) -> int:
        code = self._registers[DIVIDE]
        shift = (code & 3 | code >> 1 & 4) + 1 & 7
        return 1 << shift

    def _set_divide(self, code: int) -> None:
        """Change the pace; the count goes on from where it stands."""
        count = self._current_count()
        self._registers[DIVIDE] = code & 0xB
        if self._started is not None:
            gone = self._registers[INITIAL_COUNT] - count
            self._started = self._clock.now - self._count_ns(gone)
        self._schedule()

    def _count_ns(self, counts: int) -> int:
        return -(-counts * self._divisor() * NANOSECONDS // BUS_HZ)

    def _elapsed(self) -> int:
        assert self._started is not None
        gone = self._clock.now - self._started
        return gone * BUS_HZ // NANOSECONDS // self._divisor()

    def _current_count(self) -> int:
        initial = self._registers[INITIAL_COUNT]
        if self._started is None or not initial:
            return 0
        elapsed = self._elapsed()
        if self._registers[LVT_TIMER] & PERIODIC:
            return initial - elapsed % initial
        return max(initial - elapsed, 0)

    def _schedule(self) -> None:
        self._timer.disarm()
        initial = self._registers[INITIAL_COUNT]
        if self._started is None or not initial:
            return
        elapsed = self._elapsed()
        if self._registers[LVT_TIMER] & PERIODIC:
            due = (elapsed // initial + 1) * initial
        elif elapsed >= initial:
            return
        else:
            due = initial
        self._timer.arm(self._started + self._count_ns(due))

    def _expired(self) -> None:
        timer = self._registers[LVT_TIMER]
        if timer & PERIODIC and self._started is not None:
            self._started += self._count_ns(self._registers[INITIAL_COUNT])
            self._schedule()
        else:
            self._started = None  # a counter at 0 stays there, in any mode
        if not timer & MASKED:
            self.request(timer & 0xFF)

    def _update(self) -> None:
        if self.pending:
            self._changed()

    def state(self) -> dict[str, object]:
        """Return the state, for JSON."""
        return {
            "registers": [list(item) for item in sorted(self._registers.items())],
            "errors": self._errors,
            "isr": hex(self._isr),
            "irr": hex(self._irr),
            "tmr": hex(self._tmr),
            "started": self._started,
            "timer": self._timer.when,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state` returned.

        Raises:
            KeyError, TypeError, ValueError: not what `state` returns.
        """
        registers = {int(index): int(value) for index, value in state["registers"]}
        if registers.keys() != self._registers.keys():
            raise ValueError(f"APIC registers {sorted(registers)} are not this APIC's")
        self._registers = registers
        self._errors = int(state["errors"])
        self._isr, self._irr, self._tmr = (
            int(state[key], 16) for key in ("isr", "irr", "tmr")
        )
        started, when = state["started"], state["timer"]
        self._started = None if started is None else int(started)
        self._timer.disarm()
        if when is not None:
            self._timer.arm(int(when))
