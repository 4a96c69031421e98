"""Exceptions and interrupts into the guest: gates, stacks, frames, double faults.

The engine reports an event and leaves its delivery to us. Everything here reads the
guest's tables through its own page tables, with the rights of the processor itself.

Source: [APM2] 8.9 (long-mode interrupt control transfers), 8.2.9 (double faults),
8.1.3 (error codes); 12.2.5 (64-bit task state segment).
"""

from __future__ import annotations

from typing import Protocol

from ..cpu import Cpu
from ..errors import CbitError
from ..faults import CpuException, GeneralProtection, PageFault
from ..memory import MemoryBus
from ..paging import Access
from ..types import PAGE_SIZE
from .state import (
    ADDSEG,
    CPL_MASK,
    CS,
    CS32,
    CS64,
    GDTR,
    IDTR,
    INHIBIT_IRQ,
    RSP,
    SS,
    SS32,
    TR,
    EngineState,
)

TF, IF, NT, RF, VM, AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17, 1 << 18
INTERRUPT_GATE, TRAP_GATE = 0xE, 0xF
DEBUG, BREAKPOINT, OVERFLOW = 1, 3, 4
DOUBLE_FAULT, PAGE_FAULT = 8, 14
CONTRIBUTORY = frozenset({0, 10, 11, 12, 13})
WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
FAULTS = frozenset({0, 5, 6, 7, 10, 11, 12, 13, 14, 16, 17, 19})
"""They push RF = 1. Source: [APM2] 3.1.6 (RF) and table 8-1 (types)."""
LONGEST_CHAIN = 5
"""Deliveries that can fail in a row: #UD, #GP, #PF, #PF, #DF."""
TSS_RSP0, TSS_IST1 = 0x04, 0x24
FLAT_DATA = 0x00CF_9300

_SYSTEM = int(Access.LIFTED)
_U64 = (1 << 64) - 1


class TripleFault(CbitError):
    """A double fault could not be delivered: the processor shuts down.

    Attributes:
        first: the event that started it.
    """

    def __init__(self, first: str, second: CpuException) -> None:
        self.first = first
        super().__init__(f"triple fault: {first}, then while delivering #DF: {second}")


class GateFault(CpuException):
    """A descriptor that an event needs is absent or of the wrong kind."""

    vector = 13
    mnemonic = "GP"


class NotPresent(CpuException):
    """#NP: a gate or segment with P = 0."""

    vector = 11
    mnemonic = "NP"


class Noted(Protocol):
    """Receives each delivered event."""

    def __call__(self, vector: int, error_code: int | None) -> None:
        """Note one event."""


class Delivery:
    """Delivers events to one core.

    Args:
        state: the engine's registers.
        cpu: whose page tables and CR2 they are.
        bus: physical accesses.
        noted: called for each event that reached its handler.
    """

    def __init__(
        self, state: EngineState, cpu: Cpu, bus: MemoryBus, noted: Noted
    ) -> None:
        self._state = state
        self._cpu = cpu
        self._bus = bus
        self._noted = noted

    def fault(self, fault: CpuException) -> None:
        """Deliver an exception of the processor; #PF sets CR2."""
        if isinstance(fault, PageFault):
            self._cpu.note_page_fault(fault)
            self._state.set_cr(2, fault.address)
        self.deliver(fault.vector, fault.error_code, because=str(fault))

    def deliver(
        self,
        vector: int,
        error_code: int | None = None,
        *,
        software: int = 0,
        because: str = "",
    ) -> None:
        """Enter the handler of a vector.

        Args:
            vector: 0 to 255.
            error_code: pushed if not None.
            software: length in bytes of the INT n that RIP stands behind; 0 for other
                events. INT n needs a gate with DPL >= CPL, or it is the instruction
                that faults.
            because: what happened, in words, should it end in a triple fault.

        Raises:
            TripleFault: nor could the double fault be delivered.
        """
        first = f"vector {vector} at rip {self._state.rip:#x}"
        if because:
            first += f" ({because})"
        for _ in range(LONGEST_CHAIN):
            try:
                self._enter(vector, error_code, bool(software))
            except CpuException as second:
                self._state.rip -= software
                if vector == DOUBLE_FAULT:
                    raise TripleFault(first, second) from None
                if isinstance(second, PageFault):
                    self._cpu.note_page_fault(second)
                    self._state.set_cr(2, second.address)
                serious = second.vector in CONTRIBUTORY or second.vector == PAGE_FAULT
                if (vector in CONTRIBUTORY and second.vector in CONTRIBUTORY) or (
                    vector == PAGE_FAULT and serious
                ):
                    vector, error_code = DOUBLE_FAULT, 0
                else:
                    vector, error_code = second.vector, second.error_code
                software = 0
            else:
                self._noted(vector, error_code)
                return
        raise TripleFault(first, GeneralProtection("delivery did not settle"))

    def _enter(self, vector: int, error_code: int | None, software: bool) -> None:
        state = self._state
        external = 0 if software else 1
        offset = vector * 16
        idt = state.segments[IDTR]
        if offset + 15 > idt.limit:
            raise GateFault(
                f"vector {vector} beyond the IDT", offset // 2 | 2 | external
            )
        gate = self.load(idt.base + offset, 16)
        kind = gate >> 40 & 0x1F
        if kind not in (INTERRUPT_GATE, TRAP_GATE):
            raise GateFault(
                f"gate {vector} has type {kind:#x}", vector * 8 + 2 + external
            )
        if not gate >> 47 & 1:
            raise NotPresent(f"gate {vector}", vector * 8 + 2 + external)
        if software and (gate >> 45 & 3) < state.cpl:
            raise GateFault(f"INT {vector} from user mode", vector * 8 + 2)
        target = (
            (gate & 0xFFFF)
            | (gate >> 48 & 0xFFFF) << 16
            | (gate >> 64 & 0xFFFF_FFFF) << 32
        )
        selector = gate >> 16 & 0xFFFF
        descriptor = self._code_descriptor(selector, external)
        new_cpl = descriptor >> 45 & 3
        old_cpl = state.cpl
        if new_cpl > old_cpl:
            raise GateFault(
                f"gate {vector} leads to CPL {new_cpl}", selector & ~7 | external
            )
        if descriptor >> 42 & 1:  # conforming
            new_cpl = old_cpl

        ist = gate >> 32 & 7
        tss = state.segments[TR].base
        if ist:
            rsp = self.load(tss + TSS_IST1 + 8 * (ist - 1), 8)
        elif new_cpl != old_cpl:
            rsp = self.load(tss + TSS_RSP0 + 8 * new_cpl, 8)
        else:
            rsp = state.regs[RSP]
        rsp &= -16 & _U64
        flags = state.rflags
        saved_flags = flags
        if vector in FAULTS and not software:
            saved_flags |= RF
        frame = [
            state.rip,
            state.segments[CS].selector,
            saved_flags,
            state.regs[RSP],
            state.segments[SS].selector,
        ]
        if error_code is not None:
            frame.insert(0, error_code & 0xFFFF_FFFF)
        data = b"".join(word.to_bytes(8, "little") for word in frame)
        rsp = rsp - len(data) & _U64
        self._store(rsp, data)

        flags &= ~(TF | NT | RF | VM)
        if kind == INTERRUPT_GATE:
            flags &= ~IF
        state.rflags = flags
        state.regs[RSP] = rsp
        self.enter_segment(selector & ~3 | new_cpl, descriptor, new_cpl)
        if new_cpl != old_cpl:
            state.segments[SS].load(new_cpl, 0, 0xFFFF_FFFF, FLAT_DATA)
        state.rip = target

    def enter_segment(self, selector: int, descriptor: int, cpl: int) -> None:
        """Load CS with a 64-bit code segment and set the privilege level."""
        state = self._state
        flags = descriptor >> 32 & 0x00F0_FF00 | 0x000F_0000
        state.segments[CS].load(selector, 0, 0xFFFF_FFFF, flags)
        hflags = state.hflags & ~(CPL_MASK | INHIBIT_IRQ | ADDSEG)
        state.hflags = hflags | CS64 | CS32 | SS32 | cpl

    def _code_descriptor(self, selector: int, external: int) -> int:
        gdt = self._state.segments[GDTR]
        where = selector & ~7
        code = where | external
        if not where or where + 7 > gdt.limit or selector & 4:
            raise GateFault(f"gate names selector {selector:#x}", code)
        descriptor = self.load(gdt.base + where, 8)
        if not descriptor >> 47 & 1:
            raise NotPresent(f"code segment {selector:#x}", code)
        if descriptor >> 43 & 3 != 3 or not descriptor >> 53 & 1:
            raise GateFault(f"selector {selector:#x} is no 64-bit code segment", code)
        return descriptor

    def load(self, va: int, length: int) -> int:
        """Load a little-endian number with the processor's own rights.

        Raises:
            PageFault, GeneralProtection: not mapped, or not canonical.
        """
        va &= _U64
        data = b""
        while length:
            part = min(length, PAGE_SIZE - va % PAGE_SIZE)
            found = self._cpu.mmu.walk(va, _SYSTEM)
            data += self._bus.load(found.pa + va % PAGE_SIZE, part, found.slot)
            va, length = va + part & _U64, length - part
        return int.from_bytes(data, "little")

    def _store(self, va: int, data: bytes) -> None:
        places = []
        done = 0
        while done < len(data):
            here = va + done & _U64
            part = min(len(data) - done, PAGE_SIZE - here % PAGE_SIZE)
            found = self._cpu.mmu.walk(here, _SYSTEM | int(Access.WRITE))
            places.append((found.pa + here % PAGE_SIZE, done, part, found.slot))
            done += part
        for pa, start, length, slot in places:
            self._bus.store(pa, data[start : start + length], slot)
