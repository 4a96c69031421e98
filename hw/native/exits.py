"""Instructions that the machine answers, not the engine: CPUID, MSRs, CR, HLT, TSC.

The engine's SVM intercepts stop exactly before such an instruction and name it by its
SVM exit code; the meaning comes from the Python core (`Cpu`), so that no register is
described twice. What the engine must know as well (EFER, STAR ...) it is told.

Source: [APM2] appendix C (exit codes); [APM3] for the instructions.
"""

from __future__ import annotations

import mmap
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

import numpy as np

from ..cpu import Cpu, Cr0, Cr4
from ..faults import GeneralProtection, InvalidOpcode
from ..msr import Efer, Syscfg
from ..types import PAGE_SHIFT
from .engine import REG_CR0, REG_CR4, Engine
from .features import with_osxsave
from .fill import NativeFailure, TlbFiller
from .instruction import InstructionReader
from .memory import PERMISSION_MAP, VMCB_MSRPM
from .state import (
    CS64,
    GUEST,
    INHIBIT_IRQ,
    RAX,
    RBX,
    RCX,
    RDX,
    EngineState,
)

READ_CR8 = 0x08
WRITE_CR0, WRITE_CR3, WRITE_CR4, WRITE_CR8 = 0x10, 0x13, 0x14, 0x18
INTR, RDTSC, RDPMC, CPUID = 0x60, 0x6E, 0x6F, 0x72
INVD, HLT, INVLPG, MSR = 0x76, 0x78, 0x79, 0x7C
WBINVD, MONITOR, MWAIT = 0x89, 0x8A, 0x8B

STAR, LSTAR, CSTAR, SFMASK = 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084
FS_BASE, GS_BASE, KERNEL_GS_BASE = 0xC000_0100, 0xC000_0101, 0xC000_0102
TSC, TSC_AUX = 0x10, 0xC000_0103

ENGINE_COPIES = frozenset({STAR, LSTAR, CSTAR, SFMASK, TSC_AUX, 0x174, 0x175, 0x176})
"""Written by software through us, and given to the engine, which reads them."""

ENGINE_OWNED = frozenset({FS_BASE, GS_BASE, KERNEL_GS_BASE})
"""The engine's SWAPGS and segment loads change them: it holds the truth."""

_U32 = 0xFFFF_FFFF

KEPT = 16
"""Exits and exceptions that are remembered for a report."""

NAMES = {
    READ_CR8: "MOV from CR8",
    WRITE_CR0: "MOV to CR0",
    WRITE_CR3: "MOV to CR3",
    WRITE_CR4: "MOV to CR4",
    WRITE_CR8: "MOV to CR8",
    INTR: "interrupt",
    RDTSC: "RDTSC",
    RDPMC: "RDPMC",
    CPUID: "CPUID",
    INVD: "INVD",
    HLT: "HLT",
    INVLPG: "INVLPG",
    MSR: "RDMSR or WRMSR",
    WBINVD: "WBINVD",
    MONITOR: "MONITOR",
    MWAIT: "MWAIT",
}
_PG = Cr0.FIELDS["paging"].mask
_PGE = Cr4.FIELDS["pge"].mask


class Exits:
    """Serves the intercepts of one core.

    Args:
        halt: called for HLT, with RIP behind it.
        interrupt: called when the guest can take an interrupt.
        tsc: returns the time-stamp counter.
        task_priority: reads and writes CR8.

    Attributes:
        counts: how often each exit code came.
        recent: the last exits and delivered exceptions: name and RIP.
        msr_reads, msr_writes: by MSR.
    """

    def __init__(
        self,
        engine: Engine,
        state: EngineState,
        cpu: Cpu,
        filler: TlbFiller,
        reader: InstructionReader,
        *,
        halt: Callable[[], None],
        interrupt: Callable[[], None],
        tsc: Callable[[], int],
        task_priority: Callable[[int | None], int],
    ) -> None:
        self.counts: Counter[int] = Counter()
        self.recent: deque[tuple[str, int]] = deque(maxlen=KEPT)
        self.msr_reads: Counter[int] = Counter()
        self.msr_writes: Counter[int] = Counter()
        self._engine = engine
        self._state = state
        self._cpu = cpu
        self._filler = filler
        self._reader = reader
        self._halt = halt
        self._tsc = tsc
        self._task_priority = task_priority
        self._handlers: dict[int, Callable[[], None]] = {
            READ_CR8: self._read_cr8,
            WRITE_CR0: self._write_cr0,
            WRITE_CR3: self._write_cr3,
            WRITE_CR4: self._write_cr4,
            WRITE_CR8: self._write_cr8,
            INTR: interrupt,
            RDTSC: self._rdtsc,
            RDPMC: self._rdpmc,
            CPUID: self._cpuid,
            INVD: self._invd,
            HLT: self._hlt,
            INVLPG: self._invlpg,
            MSR: self._msr,
            WBINVD: self._wbinvd,
            MONITOR: self._invalid,
            MWAIT: self._invalid,
        }
        self._permission_map = build_permission_map()
        engine.map_memory(PERMISSION_MAP, *self._permission_map.place)
        state.intercept(PERMISSION_MAP, set(self._handlers))

    def serve(self, code: int) -> None:
        """Emulate the intercepted instruction, or raise what it raises.

        Raises:
            CpuException: to be delivered; RIP still names the instruction.
            NativeFailure: an exit that was not asked for.
        """
        self.counts[code] += 1
        self.recent.append((NAMES.get(code, "exit"), self._state.rip))
        handler = self._handlers.get(code)
        if handler is None:
            raise NativeFailure(f"exit code {code:#x}: not asked for")
        handler()

    def enter_state(self) -> None:
        """Give the engine the control registers and MSRs of the Python core."""
        cpu, engine, state = self._cpu, self._engine, self._state
        state.hflags &= ~GUEST
        # Paging last: the engine derives its mode from EFER at that moment.
        engine.write_register(REG_CR4, cpu.read_cr4())
        state.set_cr(2, cpu.cr2)
        state.set_cr(3, cpu.read_cr3())
        engine.write_msr(Efer.ADDRESS, cpu.msrs.get(Efer).value)
        engine.write_register(REG_CR0, cpu.read_cr0())
        state.hflags |= GUEST
        for index in sorted(ENGINE_COPIES):
            if cpu.msrs.declares(index):
                self._tell_engine(index, cpu.msrs.read(index))
        self._filler.flush()

    def _done(self, length: int) -> None:
        """Step behind the instruction."""
        state = self._state
        state.rip += length
        state.hflags &= ~INHIBIT_IRQ

    # Identification, MSRs, time

    def _cpuid(self) -> None:
        regs = self._state.regs
        leaf = regs[RAX] & _U32
        answer = self._cpu.cpuid(leaf, regs[RCX] & _U32)
        answer = with_osxsave(answer, leaf, self._state.cr(4))
        regs[RAX], regs[RBX], regs[RCX], regs[RDX] = answer
        self._done(2)

    def _msr(self) -> None:
        regs, state = self._state.regs, self._state
        index = regs[RCX] & _U32
        if state.cpl:
            raise GeneralProtection(f"RDMSR or WRMSR {index:#x} from user mode")
        if state.error_code & 1:
            value = (regs[RDX] & _U32) << 32 | regs[RAX] & _U32
            self.msr_writes[index] += 1
            self._cpu.wrmsr(index, value)
            if index == Efer.ADDRESS:
                value = self._cpu.msrs.get(Efer).value
                self._tell_engine(index, value)
                self._filler.flush()
            elif index == Syscfg.ADDRESS:
                self._filler.flush()
            elif index in ENGINE_COPIES:
                self._tell_engine(index, value)
        else:
            self.msr_reads[index] += 1
            value = self._cpu.rdmsr(index)
            regs[RAX], regs[RDX] = value & _U32, value >> 32
        self._done(2)

    def _tell_engine(self, index: int, value: int) -> None:
        # With the guest bit set the engine would intercept its own access.
        state = self._state
        state.hflags &= ~GUEST
        self._engine.write_msr(index, value)
        state.hflags |= GUEST

    def own_msr(self, index: int) -> None:
        """Let the engine hold an MSR: it starts with the value of the Python core."""
        msrs = self._cpu.msrs
        self._tell_engine(index, msrs.read(index))
        msrs.serve(
            index,
            partial(self.read_engine_msr, index),
            partial(self._tell_engine, index),
        )

    def disown_msr(self, index: int) -> None:
        """Take an MSR's value from the engine, which goes, into the Python core."""
        msrs, value = self._cpu.msrs, self.read_engine_msr(index)
        msrs.take_back(index)
        msrs.write(index, value)

    def read_engine_msr(self, index: int) -> int:
        """Return an MSR that the engine holds."""
        state = self._state
        state.hflags &= ~GUEST
        value = self._engine.read_msr(index)
        state.hflags |= GUEST
        return value

    def _rdtsc(self) -> None:
        regs = self._state.regs
        value = self._tsc()
        regs[RAX], regs[RDX] = value & _U32, value >> 32
        if self._reader.code_at(self._state.rip, 2) == b"\x0f\x31":
            self._done(2)
        else:
            regs[RCX] = self._cpu.msrs.read(TSC_AUX)
            self._done(3)

    def _rdpmc(self) -> None:
        raise GeneralProtection("RDPMC: no performance counter")

    # Control registers and the TLB

    def _write_cr0(self) -> None:
        value, length = self._reader.cr_operand(self._state.cr(0))
        if not value & _PG and self._state.hflags & CS64:
            # Source: [APM3] MOV CRn: paging cannot be left from 64-bit code; from
            # compatibility mode it can, as Linux does to change the number of levels.
            raise GeneralProtection(f"MOV CR0 {value:#x}: PG is needed in 64-bit mode")
        self._cpu.write_cr0(value)
        self._engine.write_register(REG_CR0, self._cpu.read_cr0())
        self._filler.flush()
        self._done(length)

    def _write_cr3(self) -> None:
        value, length = self._reader.cr3_operand()
        cpu = self._cpu
        cpu.write_cr3(value)
        self._state.set_cr(3, cpu.read_cr3())
        if self._state.cr(4) & _PGE:
            self._filler.flush_local()
        else:
            self._filler.flush()
        self._done(length)

    def _write_cr4(self) -> None:
        value, length = self._reader.cr_operand(0)
        self._cpu.write_cr4(value)
        self._engine.write_register(REG_CR4, value)
        self._filler.flush()
        self._done(length)

    def _read_cr8(self) -> None:
        register, length = self._reader.cr_register()
        self._state.regs[register] = self._task_priority(None)
        self._done(length)

    def _write_cr8(self) -> None:
        value, length = self._reader.cr_operand(0)
        if value >> 4:
            raise GeneralProtection(f"MOV CR8 {value:#x}: 4 bits")
        self._task_priority(value)
        self._done(length)

    def _invlpg(self) -> None:
        va, length = self._reader.memory_operand()
        self._filler.drop(va)
        self._cpu.invlpg(va)
        self._done(length)

    # Caches and halting

    def _wbinvd(self) -> None:
        self._cpu.wbinvd()
        self._done(2)

    def _invd(self) -> None:
        raise GeneralProtection("INVD would lose what the caches hold")

    def _hlt(self) -> None:
        self._done(1)
        self._halt()

    def _invalid(self) -> None:
        raise InvalidOpcode("MONITOR and MWAIT are not offered")


class _HostPages:
    """Host memory that the engine maps: the VMCB and the MSR permission map."""

    def __init__(self, pages: int) -> None:
        size = pages << PAGE_SHIFT
        self.memory = mmap.mmap(-1, size)
        array = np.frombuffer(self.memory, np.uint8)
        self.place = (size, int(array.ctypes.data))


def build_permission_map() -> _HostPages:
    """Return a VMCB page and a map that lets the engine's own MSRs through.

    Source: [APM2] 15.11 (MSR intercepts): two bits an MSR, 1 intercepts.
    """
    pages = _HostPages(3)
    memory = pages.memory
    memory[VMCB_MSRPM : VMCB_MSRPM + 8] = (PERMISSION_MAP + 4096).to_bytes(8, "little")
    memory[4096:] = b"\xff" * 8192
    for index in ENGINE_OWNED:
        bit = (0x2000 + index - 0xC000_0000) * 2
        at = 4096 + bit // 8
        memory[at] &= ~(3 << bit % 8) & 0xFF
    return pages
