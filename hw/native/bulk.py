"""Long REP MOVS and REP STOS, done in one go.

The engine repeats string instructions one element at a time, through a TLB whose
entries last a page. A fill for a store is where a long one shows: the core refuses the
fill, the engine ends at the exact element, and the rest is moved here through the
Python core's own copy and fill, with whole pages overwritten and no cipher for what
they held.

Source: [APM3] chapter 1, "Repeat Prefixes"; MOVS, STOS.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..cpu import Cpu
from ..faults import CpuException
from ..types import PAGE_SIZE
from .state import RAX, RCX, RDI, RSI, EngineState

_U64 = (1 << 64) - 1

WORTH_IT = 2 * PAGE_SIZE
"""Bytes left from which a bulk operation beats the engine."""

_MOVS, _STOS = (0xA4, 0xA5), (0xAA, 0xAB)


class StringOperation(NamedTuple):
    """A REP MOVS or STOS as the registers stand: elements of `size` bytes."""

    copies: bool
    size: int
    count: int
    length: int


class Bulk:
    """Recognises and performs long string operations of one core.

    Attributes:
        performed: how many there were.
    """

    def __init__(self, state: EngineState, cpu: Cpu) -> None:
        self.performed = 0
        self._other_code = -1  # where there was no string operation, last
        self._state = state
        self._cpu = cpu
        self.code_at = lambda rip, length: b""

    def is_worth_it(self, va: int) -> bool:
        """Tell whether the access that misses at page `va` belongs to a long one."""
        regs = self._state.regs
        if regs[RCX] < WORTH_IT // 8 or va not in (
            regs[RDI] & -PAGE_SIZE,
            regs[RSI] & -PAGE_SIZE,
        ):
            return False
        rip = self._state.rip
        if rip == self._other_code:
            return False
        operation = self.decode()
        if operation is None:
            self._other_code = rip
            return False
        return operation.size * operation.count >= WORTH_IT

    def decode(self) -> StringOperation | None:
        """Return the operation at RIP, or None if it is none that is done here."""
        code = self.code_at(self._state.rip, 4)
        if len(code) < 2 or code[0] != 0xF3:
            return None
        at, wide = 1, False
        if code[1] & 0xF0 == 0x40:
            at, wide = 2, bool(code[1] & 8)
        if len(code) <= at or code[at] not in _MOVS + _STOS:
            return None
        size = (8 if wide else 4) if code[at] & 1 else 1
        return StringOperation(code[at] in _MOVS, size, self._state.regs[RCX], at + 1)

    def perform(self, operation: StringOperation) -> tuple[int, int]:
        """Do as much as the mappings allow; return where bytes went and how many.

        The registers are left as the instruction leaves them at that element. A fault
        ends it early and is for the engine to find again.
        """
        regs, cpu = self._state.regs, self._cpu
        target, source = regs[RDI], regs[RSI]
        wanted = operation.size * operation.count
        if self._state.direction_down:
            return self._perform_down(operation)
        length = self._mapped(target, wanted, write=True)
        if operation.copies:
            length = min(length, self._mapped(source, length, write=False))
            if target - source & _U64 < length:
                length = 0  # each element repeats an earlier one: not a copy
        length -= length % operation.size
        if not length:
            return target, 0
        if operation.copies:
            cpu.copy(target, source, length)
            regs[RSI] = source + length & _U64
        else:
            self._fill(target, operation.size, length)
        regs[RDI] = target + length & _U64
        regs[RCX] -= length // operation.size
        self.performed += 1
        return target, length

    def _perform_down(self, operation: StringOperation) -> tuple[int, int]:
        """Do a MOVS that goes to lower addresses, whole or not at all."""
        regs, cpu, size = self._state.regs, self._cpu, operation.size
        length = size * operation.count
        target = regs[RDI] + size - length & _U64
        source = regs[RSI] + size - length & _U64
        repeats = source - target & _U64 < length
        if (
            not operation.copies
            or repeats
            or max(target, source) + length > _U64
            or self._mapped(target, length, write=True) < length
            or self._mapped(source, length, write=False) < length
        ):
            return target, 0
        cpu.store(target, cpu.load(source, length))
        regs[RDI] = target - size & _U64
        regs[RSI] = source - size & _U64
        regs[RCX] = 0
        self.performed += 1
        return target, length

    def _mapped(self, va: int, length: int, *, write: bool) -> int:
        """Return how many of the bytes from `va` on can be reached."""
        done = 0
        access = 2 if write else 0
        runs = self._cpu.mmu.runs(va, length, access)
        try:
            for run in runs:
                done += run.length
        except CpuException:
            pass
        return done

    def _fill(self, va: int, size: int, length: int) -> None:
        element = (self._state.regs[RAX] & (1 << 8 * size) - 1).to_bytes(size, "little")
        if element == element[:1] * size:
            self._cpu.fill(va, element[0], length)
            return
        words = np.frombuffer(element * (PAGE_SIZE // size), np.uint8)
        done = 0
        while done < length:
            part = words[: min(PAGE_SIZE, length - done)]
            self._cpu.store(va + done, part.tobytes())
            done += len(part)
